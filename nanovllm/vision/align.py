"""The former path of the projector's training: ``python -m nanovllm.vision.align`` is ``nanovllm align``."""

import sys

from nanovllm.training.align import main

if __name__ == "__main__":
    sys.exit(main())
