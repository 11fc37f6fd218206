"""Where the WebUI finds DynFuse: it takes every Script class among this file's names, so there must be exactly one."""

from lib_dynfuse.webui.script import DynFuseScript, register

__all__ = ["DynFuseScript"]

register()
