"""Write the JSON files of this folder. Run it with a Python that has harbor; README.md has the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from grid import files  # type: ignore[import-not-found]
from harbor.models.task.config import TaskConfig  # type: ignore[import-not-found]
from harbor.models.trajectories import Trajectory  # type: ignore[import-not-found]


def bare(schema: Any) -> Any:
    """Return a schema without its titles and descriptions. A property of such a name has an object as its value."""
    if isinstance(schema, list):
        return [bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: bare(value)
        for key, value in schema.items()
        if not (key in ("title", "description") and isinstance(value, str))
    }


def is_accepted(text: str) -> bool:
    try:
        TaskConfig.model_validate_toml(text)
    except ValueError:
        return False
    return True


def main(folder: Path) -> None:
    for name, content in (
        ("task_config", bare(TaskConfig.model_json_schema())),
        ("trajectory", bare(Trajectory.model_json_schema())),
        ("accepted", [text for text in files() if is_accepted(text)]),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
