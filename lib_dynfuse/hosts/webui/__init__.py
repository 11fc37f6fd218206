"""DynFuse inside a running WebUI."""
