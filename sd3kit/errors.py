"""What a person can mend."""


class UserError(RuntimeError):
    """Something went wrong that a person can mend; the message is one sentence that says what to do.

    Command lines print it after the command's name and end with a non-zero exit code.
    """
