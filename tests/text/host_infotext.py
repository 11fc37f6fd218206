"""How a WebUI writes and reads the parameters' line, reimplemented from the format's description.

Values with a comma, a colon or a line break are JSON strings; a value of the form WIDTHxHEIGHT is split in two.
"""

import json
import re


def create_infotext_line(entries):
    """The line a WebUI writes for extra_generation_params; two entries of its own come first, as in every image."""
    pairs = {"Steps": 20, "Sampler": "Euler", "Seed": 1, **entries}
    return ", ".join(key if key == value else f"{key}: {_quoted(value)}" for key, value in pairs.items())


def parse_infotext_line(line):
    """The dict a WebUI hands to paste fields."""
    entries = {}
    for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line):
        if value[:1] == '"' and value[-1:] == '"':
            value = json.loads(value)
        if size := re.match(r"^(\d+)x(\d+)$", value):
            entries[f"{key}-1"], entries[f"{key}-2"] = size.groups()
        else:
            entries[key] = value
    return entries


def _quoted(value):
    return json.dumps(value, ensure_ascii=False) if any(character in str(value) for character in ",\n:") else value
