"""The error that all readers of settings raise."""


class SettingsError(ValueError):
    """A setting that cannot be used. The message names the setting and the values it takes."""
