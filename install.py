"""Run by the WebUI at every launch, in a process of its own.

A1111 and Forge bring everything that DynFuse imports. A WebUI without open_clip (some forks) gets it, and the small packages that it
imports, without their dependencies: those would move versions that the WebUI pins.
"""

import importlib.util

# Package to import -> what to install.
NEEDED = {"open_clip": "open_clip_torch==2.20.0", "ftfy": "ftfy", "wcwidth": "wcwidth", "regex": "regex"}

missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    import launch

    if not launch.args.skip_install:
        launch.run_pip(f"install --no-deps {' '.join(missing)}", "what DynFuse's CLIP encoder needs")
