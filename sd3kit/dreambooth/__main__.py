"""The command: `accelerate launch -m sd3kit.dreambooth --instance_data_dir ... --instance_prompt ...`."""

import errno
import sys

from .settings import DreamBoothError, parse


def main(arguments: list[str] | None = None) -> int:
    """Train as the arguments say; a wrong one, or whatever stops the training, is answered by one sentence.

    Returns:
        0, or 2 after an error, or 130 when it was stopped from the keyboard. What was saved so far is kept.
    """
    try:
        settings = parse(arguments)
        settings.check()  # before torch and diffusers are imported, which takes seconds

        import torch

        from ..loading.names import LoadError
        from .train import train

        try:
            train(settings)
        except LoadError as error:
            raise DreamBoothError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise DreamBoothError(
                "The device's memory is full: add --gradient_checkpointing, --cache_latents and --use_8bit_adam, or "
                "lower --train_batch_size or --resolution."
            ) from error
    except DreamBoothError as error:
        print(f"dreambooth: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            "dreambooth: The disk is full: make room and go on with --resume_from_checkpoint latest.", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("dreambooth: stopped; --resume_from_checkpoint latest goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
