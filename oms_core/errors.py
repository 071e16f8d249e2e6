"""The one exception for anything a user can put right."""


class InputError(ValueError):
    """Bad input, said in one sentence that names the thing and the next step.

    Pages show the sentence as it is; the command line prints it and exits with code 2.
    """
