"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in a config, a path, a checkpoint or a task.

    The message names the key, says what was wrong and what is allowed. It is shown without a traceback;
    everything else that goes wrong is a defect of ovqk and keeps its traceback.
    """
