"""transformers' configurations and tokenizers, imported without what its models import.

For the names of the activation functions a configuration imports the loading of models: torch.distributed's tensors,
sympy, accelerate. And of the source files below ``transformers/models``, which ``import transformers`` reads to find
the names that they export, all are read once more with the first module of that package. Both take longer than the
rest of transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers.utils import import_utils

_VALIDATORS = "transformers.utils.type_validators"
_ACTIVATIONS = "transformers.activations"


class _Activations(dict[str, Any]):
    """The names of transformers' activation functions, of which the most frequent ones are known without its table."""

    @property
    def _table(self) -> dict[str, Any]:
        from transformers.activations import ACT2FN

        return ACT2FN

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._table

    def keys(self) -> Any:
        """All names."""
        return self._table.keys()


ACTIVATIONS = _Activations.fromkeys(("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"))


def _read_sources_once() -> None:
    """Give what transformers has found in its source files for the same folder under another spelling, too."""
    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is not None and "transformers.models" not in sys.modules:
        models = Path(transformers.__file__).parent / "models"
        import_utils.create_import_structure_from_path = _by_folder(read, models)


def _by_folder(read: Callable[[Any], Any], models: Path) -> Callable[[Any], Any]:
    """``read``, which keeps its results by argument, of the folder that a path is or is in."""

    def read_folder(path: Any) -> Any:
        folder = os.path.dirname(path) if os.path.isfile(path) else str(path)
        return read(models if folder == str(models) else folder)  # a Path here, strings below it: as it was called

    return read_folder


def _import_validators() -> None:
    """Import the validators of configurations' fields with `ACTIVATIONS` for the table of functions."""
    if _ACTIVATIONS in sys.modules or _VALIDATORS in sys.modules:
        return
    stand_in = ModuleType(_ACTIVATIONS)
    stand_in.ACT2FN = ACTIVATIONS  # type: ignore[attr-defined]
    sys.modules[_ACTIVATIONS] = stand_in
    try:
        import transformers.utils.type_validators  # noqa: F401
    except ImportError:  # a release that needs more of that module, or has no such validators
        pass
    finally:
        del sys.modules[_ACTIVATIONS]


_read_sources_once()
_import_validators()

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

__all__ = [
    "ACTIVATIONS",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoConfig",
    "AutoTokenizer",
    "PreTrainedConfig",
    "PreTrainedTokenizerFast",
]
