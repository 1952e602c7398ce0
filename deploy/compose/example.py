"""The example of compose.yaml: demo models are put into a bucket, merged from there to there on a cluster, verified.

python example.py s3://BUCKET SCHEDULER
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import s3fs

RECIPE = """
merge_method: ties
base_model: {bucket}/base
models:
  - {{model: {bucket}/variant-a, parameters: {{weight: 0.6, density: 0.5}}}}
  - {{model: {bucket}/variant-b, parameters: {{weight: 0.4, density: 0.5}}}}
dtype: bfloat16
"""


def main(bucket: str, scheduler: str) -> None:
    """Make the models, merge them, verify the result."""
    with tempfile.TemporaryDirectory() as folder:
        demo, recipe = Path(folder, "demo"), Path(folder, "recipe.yml")
        mergemill("demo", str(demo))
        put_models(demo, bucket)
        recipe.write_text(RECIPE.format(bucket=bucket), encoding="utf-8")
        mergemill("merge", str(recipe), f"{bucket}/merged", "--scheduler", scheduler, "--memory", "1GiB")
    mergemill("verify", f"{bucket}/merged")


def put_models(demo: Path, bucket: str) -> None:
    """Put the three models of the demo into the bucket, which is made where it is not there."""
    storage = s3fs.S3FileSystem()
    if not storage.exists(bucket):
        storage.mkdir(bucket)
    for name in ("base", "variant-a", "variant-b"):
        for path in sorted((demo / "models" / name).iterdir()):
            storage.put_file(str(path), f"{bucket}/{name}/{path.name}")


def mergemill(*arguments: str) -> None:
    """Run a command of mergemill; the example ends where it fails."""
    subprocess.run(["mergemill", *arguments], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
