"""The recipe's JSON schema, for completion and checks in an editor: `python -m megavlm.config.jsonschema > recipe.schema.json`.

Descriptions are the docstrings under the fields. A recipe whose first line is
`# yaml-language-server: $schema=PATH` is then checked while it is typed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from megavlm.config.compose import BASE_KEY
from megavlm.config.schema import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, `base` included. No field is required: a base file may hold it."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema.pop("required", None)
    path = {"type": "string"}
    schema["properties"][BASE_KEY] = {
        "anyOf": [path, {"type": "array", "items": path}],
        "description": "Files that this one builds on, relative to it: merged in order, later wins.",
    }
    return schema


if __name__ == "__main__":
    json.dump(recipe_schema(), sys.stdout, indent=2)
    sys.stdout.write("\n")
