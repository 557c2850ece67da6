"""Writes the JSON Schema of report.json from the types that make it.

report_schema.py            rewrites eval/quantkit_eval/report.schema.json
report_schema.py --check    exit code 1 if it would change
"""

from __future__ import annotations

import json
import sys

import common
from quantkit_eval.records import json_schema


def main() -> None:
    path = common.ROOT / "eval" / "quantkit_eval" / "report.schema.json"
    text = json.dumps(json_schema(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        sys.exit(int(not path.exists() or path.read_text(encoding="utf-8") != text))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
