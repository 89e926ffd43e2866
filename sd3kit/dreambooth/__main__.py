"""The command: `accelerate launch -m sd3kit.dreambooth --instance_data_dir ... --instance_prompt ...`."""

import os
import sys

from .. import files
from ..errors import answer
from .checks import check
from .settings import DreamBoothError, parse


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say; a wrong one, or whatever stops the training, is answered by one sentence.

    Returns:
        0, or 2 after an error, or 130 when it was stopped from the keyboard. What was saved so far is kept.
    """
    return answer(
        lambda: _train(arguments), "stopped; --resume_from_checkpoint latest goes on from the last checkpoint."
    )


def _train(arguments: list[str] | None) -> None:
    settings = parse(arguments)
    check(settings)  # before torch and diffusers are imported, which takes seconds
    if os.path.isdir(settings.output_dir):
        with files.lock(settings.output_dir):
            pass  # another training there is told at once too
    from ..loading.device import is_out_of_memory
    from .train import train

    try:
        train(settings)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DreamBoothError(
            "The device's memory is full: add --gradient_checkpointing, --cache_latents and --use_8bit_adam, or lower "
            "--train_batch_size or --resolution."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
