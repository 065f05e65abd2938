"""Images without a Docker engine, built by buildah onto a base that debootstrap makes.

    python tools/build_image.py [cpu] [remote] [cuda] [--folder build/image] [--suite bookworm] [--mirror URL]
                                [--build-arg NAME=VALUE] [--volume HOST:PATH[:ro]]

It runs as root on Debian (`apt-get install buildah debootstrap`). The base takes the place of Docker Hub's
``python:3.12-slim``: a minimal Debian with its own Python. What pip and apt are told on a machine (an index, a proxy,
certificates) is not part of an image: hand it in by ``--volume``, such as ``--volume /etc/pip.conf:/etc/pip.conf:ro``.
Everything lies in ``--folder``, the images in buildah's storage there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "image"
SUITE = "bookworm"
BASE = "localhost/nanovllm-base"
PACKAGES = "ca-certificates,python3,python3-venv"
# As in Docker Hub's slim images: no documentation but licences, no translations, no archives of packages.
UNNEEDED = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/cache/apt")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NO_ARCHIVES = 'APT::Keep-Downloaded-Packages "false";\n'


@dataclass(frozen=True)
class Variant:
    """A Dockerfile and the arguments that it is given beside ``BASE``."""

    dockerfile: str
    arguments: Mapping[str, str]


VARIANTS = {
    "cpu": Variant("Dockerfile", {}),
    "remote": Variant("Dockerfile", {"EXTRAS": "remote"}),
    # Without flash-attn nothing is taken from NVIDIA's image.
    "cuda": Variant("Dockerfile.cuda", {"FLASH_ATTN": "", "CUDA_BASE": BASE}),
}


@dataclass(frozen=True)
class Layer:
    """A layer of an image: its bytes as files' archive, and compressed as a registry serves it."""

    bytes: int
    compressed_bytes: int


class Storage:
    """buildah's storage in ``folder``. Its commands raise CalledProcessError where buildah fails."""

    def __init__(self, folder: Path, driver: str = "vfs") -> None:
        self.folder = folder.resolve()
        self._options = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        self._options += ["--storage-driver", driver]

    def buildah(self, command: str, *arguments: str, stdout: int = subprocess.PIPE) -> str:
        """Run a command of buildah; what it printed, where ``stdout`` is no file descriptor that takes it."""
        line = ["buildah", *self._options, command, *arguments]
        return (subprocess.run(line, check=True, stdout=stdout, text=True).stdout or "").strip()

    def has(self, image: str) -> bool:
        """Whether the storage has ``image``."""
        line = ["buildah", *self._options, "inspect", "--type", "image", image]
        return subprocess.run(line, capture_output=True, check=False).returncode == 0

    def configuration(self, image: str) -> dict[str, Any]:
        """User, entry point, environment and working directory, by the names of the OCI image specification."""
        found: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
        return found

    def root(self, image: str) -> Path:
        """The root of a container of ``image``, mounted; it is made once for each build of the image."""
        container = f"root-{image.rpartition('/')[2].replace(':', '-')}"
        if container not in self.buildah("containers", "--format", "{{.ContainerName}}").split():
            self.buildah("from", "--pull-never", "--name", container, image)
        return Path(self.buildah("mount", container))

    def discard_root(self, image: str) -> None:
        """Remove the container of `root`, where there is one."""
        container = f"root-{image.rpartition('/')[2].replace(':', '-')}"
        if container in self.buildah("containers", "--format", "{{.ContainerName}}").split():
            self.buildah("rm", container)

    def layers(self, image: str) -> list[Layer]:
        """The layers of ``image`` from the base upwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as parent:
            layout = Path(parent, "oci")
            self.buildah("push", "--quiet", image, f"oci:{layout}:image")
            index = json.loads((layout / "index.json").read_text())
            manifest = json.loads(_blob(layout, index["manifests"][0]["digest"]).read_text())
            blobs = [_blob(layout, layer["digest"]) for layer in manifest["layers"]]
            return [Layer(bytes=_unpacked_bytes(blob), compressed_bytes=blob.stat().st_size) for blob in blobs]


def name_of(variant: str) -> str:
    """The image's name in the storage."""
    return f"localhost/nanovllm:{variant}"


def make_base(storage: Storage, suite: str = SUITE, mirror: str = "") -> None:
    """Make the image ``BASE`` by debootstrap, where the storage does not have it; no mirror: debootstrap's own."""
    if storage.has(BASE):
        return
    storage.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=storage.folder) as parent:
        root, archive = Path(parent, "root"), Path(parent, "base.tar")
        command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root)]
        subprocess.run([*command, *([mirror] if mirror else [])], check=True, stdout=subprocess.DEVNULL)
        for path in (path for folder in UNNEEDED for path in (root / folder).rglob("*")):
            if path.is_symlink() or (path.is_file() and path.name != "copyright"):
                path.unlink()
        shutil.rmtree(root / "var/lib/apt/lists")
        (root / "etc/apt/apt.conf.d/90no-archives").write_text(NO_ARCHIVES)
        subprocess.run(["tar", "--numeric-owner", "-C", str(root), "-cf", str(archive), "."], check=True)
        import_base(storage, archive, BASE)


def import_base(storage: Storage, archive: Path, name: str) -> None:
    """Make an image ``name`` of a tar ``archive``, with the search path that Docker Hub's bases set too."""
    container = storage.buildah("from", "scratch")
    storage.buildah("add", "--quiet", container, str(archive), "/")
    storage.buildah("config", "--env", f"PATH={SEARCH_PATH}", container)
    storage.buildah("commit", "--quiet", "--rm", container, name)


def build(storage: Storage, variant: str, options: Sequence[str] = (), base: str = BASE) -> str:
    """Build a variant from this tree; returns the image's name.

    Args:
        storage: where ``base`` is, and the image will be.
        variant: one of ``VARIANTS``.
        options: further options of ``buildah bud``; an argument given here wins over the variant's.
        base: what the Dockerfile builds onto.

    Raises:
        CalledProcessError: an instruction failed; what it printed is on stderr.
    """
    chosen = VARIANTS[variant]
    image = name_of(variant)
    arguments = {name: base if value == BASE else value for name, value in {"BASE": BASE, **chosen.arguments}.items()}
    command = ["--isolation", "chroot", "--format", "docker", "--pull-never", "--tag", image]
    command += ["--file", str(ROOT / chosen.dockerfile)]
    command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    storage.discard_root(image)
    storage.buildah("bud", *command, *options, str(ROOT), stdout=sys.stderr.fileno())
    return image


def largest_packages(root: Path, count: int = 8) -> dict[str, int]:
    """Bytes of the ``count`` largest entries of the image's site-packages, in order of size."""
    (packages,) = root.glob("opt/nanovllm/lib/python3*/site-packages")
    sizes = {entry.name: _bytes_below(entry) for entry in packages.iterdir()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:count])


def _bytes_below(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]
    return sum(one.stat().st_size for one in files)


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _unpacked_bytes(blob: Path) -> int:
    total, unpacking = 0, zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            # The compressor may have written several gzip members.
            while chunk:
                total += len(unpacking.decompress(chunk))
                chunk = unpacking.unused_data
                if unpacking.eof:
                    unpacking = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    return total


def main() -> None:
    """Build what the command line names, and print the layers of each as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"{', '.join(VARIANTS)}; none: only the base")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--driver", default="vfs", help="of the storage: vfs works everywhere, overlay takes less room")
    parser.add_argument("--suite", default=SUITE, help="of Debian; its Python is the image's")
    parser.add_argument("--mirror", default="", help="URL of Debian's packages; none: debootstrap's own")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--volume", action="append", default=[], metavar="HOST:PATH[:ro]", help="mounted while building"
    )
    asked = parser.parse_args()
    if unknown := set(asked.variants) - set(VARIANTS):
        parser.error(f"{sorted(unknown)} are no variants; there are {', '.join(VARIANTS)}")
    storage = Storage(asked.folder, asked.driver)
    make_base(storage, asked.suite, asked.mirror)
    options = [word for value in asked.build_arg for word in ("--build-arg", value)]
    options += [word for value in asked.volume for word in ("--volume", value)]
    for variant in asked.variants:
        image = build(storage, variant, options)
        print(json.dumps({"image": image, "layers": [asdict(layer) for layer in storage.layers(image)]}))


if __name__ == "__main__":
    main()
