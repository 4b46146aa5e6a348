"""The two ways a run can end badly, told apart so that the command line can answer with the right exit code."""


class InputError(ValueError):
    """The user's input is at fault: a file, a row, a key, a value, an option.

    The message is one line that says what was wrong, where (file, line, key, or option), and what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """


class TrainingDiverged(RuntimeError):
    """A loss or gradient was NaN or infinite. Raised before the optimizer step, so saved checkpoints stay finite.

    The command line prints it without a traceback and exits with code 1.
    """
