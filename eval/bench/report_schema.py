"""Writes the JSON Schemas of report.json from the types that make it.

report_schema.py            rewrites report.schema.json of eval/quantkit_eval/report and vectors/
report_schema.py --check    exit code 1 if it would change
"""

from __future__ import annotations

import json
import sys

import common
from quantkit_eval.records import json_schema
from quantkit_eval.vectors.records import VECTOR_SCHEMA, VectorReport


def main() -> None:
    folder = common.ROOT / "eval" / "quantkit_eval"
    schemas = {
        folder / "report" / "report.schema.json": json_schema(),
        folder / "vectors" / "report.schema.json": json_schema(VectorReport, VECTOR_SCHEMA),
    }
    texts = {path: json.dumps(schema, indent=1) + "\n" for path, schema in schemas.items()}
    if "--check" in sys.argv[1:]:
        same = all(p.exists() and p.read_text(encoding="utf-8") == t for p, t in texts.items())
        sys.exit(int(not same))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
