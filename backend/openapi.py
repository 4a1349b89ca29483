"""Print the OpenAPI document: ``python -m attnscope.backend.openapi > openapi.json``."""

from __future__ import annotations

import json
import sys

from .api_document import document
from .app import create_app
from .config import Config


def main() -> None:
    """Print the document, the same at every call."""
    json.dump(document(create_app(Config())), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
