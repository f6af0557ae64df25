"""Training Ready: from a bucket of conversations to a served model.

The rooms and who may import whom are drawn in ``CONTRIBUTING.md``. Importing this package imports nothing else.
"""

__version__ = "0.1.0"


class TrainingReadyError(Exception):
    """A failure that a person can act on.

    The message says what failed, where (file:line or s3 key), why, and the next thing to do. The front door prints
    it without a traceback and exits with 1; anything else that escapes is a bug and keeps its traceback.
    """
