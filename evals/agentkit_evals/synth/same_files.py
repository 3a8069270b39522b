"""Verifier that compares files with those expected.

JSON and TOML are compared by value, all others by line, without blank lines and quotes.
"""

import json
import os
import sys
import tomllib


def parsed(path: str, text: str) -> object:
    """Return a file's content in the form in which it is compared."""
    if path.endswith(".json"):
        return json.loads(text)
    if path.endswith(".toml"):
        return tomllib.loads(text)
    return [line.replace('"', "").replace("'", "").rstrip() for line in text.splitlines() if line.strip()]


def main() -> None:
    """Compare the files in `$AGENTKIT_VERIFIER_DIR/expected` with those in the current directory."""
    root = os.path.join(os.environ["AGENTKIT_VERIFIER_DIR"], "expected")
    for folder, _, names in os.walk(root):
        for name in names:
            expected = os.path.join(folder, name)
            given = os.path.relpath(expected, root)
            if not os.path.isfile(given):
                sys.exit(f"{given} is missing")
            with open(given, encoding="utf-8") as one, open(expected, encoding="utf-8") as other:
                if parsed(given, one.read()) != parsed(given, other.read()):
                    sys.exit(f"{given} is not as asked")


if __name__ == "__main__":
    main()
