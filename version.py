"""The version of the plugin, the server and the page: they are released together."""

__version__ = "0.1.0"
