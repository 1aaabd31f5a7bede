"""What a user can get wrong about launching."""


class LaunchError(ValueError):
    """The ranks that were asked for cannot be started here; the message says what to do."""
