"""deploy/slurm/driver.sh as a job of a real SLURM: it merges, and goes on where it was ended, whatever ended it."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from deployments import DEPLOY
from runs.merging import hash_output, make_recipe, write_family
from servers.slurm import Slurm

from mergemill.cli.status import say_resume
from mergemill.engine import load_recipe, make_plan, run, status
from mergemill.engine.runs.status import Status

DRIVER = DEPLOY / "slurm" / "driver.sh"
WAIT_S = 120.0
SLOW_S = 0.2  # a slab
SLOW = "import sys; sys.path.insert(0, {tests!r})\nfrom runs.merging import slow_down\nslow_down({slow_s})\n"

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Site:
    """A folder from which jobs are submitted, and what they leave there."""

    slurm: Slurm
    folder: Path
    preload: Path  # what each worker runs first

    @property
    def out(self) -> Path:
        return self.folder / "an out"

    def submit(self, *options: str) -> str:
        """Submit a merge of two workers, and return its job's number."""
        words = ["--parsable", "--ntasks-per-node=2", *options, str(DRIVER), "a recipe.yml", "an out"]
        return self.slurm.call("sbatch", *words, "--shard-size", "tensor").strip()

    def set_pace(self, slow_s: float) -> None:
        """Let each slab of workers that start from now on take so much longer."""
        self.preload.write_text(SLOW.format(tests=str(Path(__file__).parents[1]), slow_s=slow_s) if slow_s else "")

    def wait_for(self, what: Callable[[], bool]) -> None:
        end_s = time.monotonic() + WAIT_S
        while not what():
            assert time.monotonic() < end_s, self.read_logs()
            time.sleep(0.2)

    def wait_for_end(self, number: str) -> None:
        self.wait_for(lambda: number not in self.slurm.list_jobs())

    def wait_for_a_part(self, done: int = 0) -> None:
        """Return once a job has done a part, beside those that were `done`, but not all."""
        self.wait_for((self.out / ".mergemill" / "driver.json").exists)
        self.wait_for(lambda: status(self.out).parts_done > done)
        seen = status(self.out)
        assert (seen.state, seen.parts_done < seen.parts) == ("running", True)

    def read_logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def list_left(self, *numbers: str) -> set[str]:
        """Return what lies in the folder beside the recipe, the output and the logs of these jobs."""
        known = {"a recipe.yml", "an out", *(f"slurm-{number}.out" for number in numbers)}
        return {path.name for path in self.folder.iterdir()} - known


@pytest.fixture(scope="module")
def recipe_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_recipe("ties", write_family(tmp_path_factory.mktemp("family"))).text


@pytest.fixture(scope="module")
def expected(recipe_text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The bytes of a merge by threads of this process."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "a recipe.yml").write_text(recipe_text)
    run(make_plan(load_recipe(folder / "a recipe.yml"), shard_size="tensor"), folder / "out", workers=0)
    return hash_output(folder / "out")


@pytest.fixture
def site(slurm: Slurm, recipe_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A folder with a recipe, as the working directory; `mergemill` and `python` are those of this test."""
    folder, scratch = tmp_path / "a job", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    (folder / "a recipe.yml").write_text(recipe_text)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("MERGEMILL_MEMORY", "64MiB")
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__PRELOAD", str(scratch / "preload.py"))
    made = Site(slurm, folder, scratch / "preload.py")
    made.set_pace(0)
    return made


def test_a_job_merges_and_leaves_only_the_output_and_its_log(site: Site, expected: dict[str, str]) -> None:
    number = site.submit()
    site.wait_for_end(number)
    assert status(site.out).state == "finished", site.read_logs()
    assert hash_output(site.out) == expected
    assert site.list_left(number) == set()
    assert [path for path in site.preload.parent.rglob("worker-*") if path.is_dir()] == []


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask, told of certificates where jobs are submitted, and so by SLURM in the jobs too."""
    folder = tmp_path / "certificates"
    subprocess.run([DEPLOY / "tls" / "make_certificates.sh", folder], check=True, capture_output=True)
    monkeypatch.setenv("DASK_CONFIG", str(folder))


@pytest.mark.usefixtures("secured")
def test_a_job_talks_tls_where_dask_is_told_to(site: Site, expected: dict[str, str]) -> None:
    site.wait_for_end(site.submit())
    assert hash_output(site.out) == expected, site.read_logs()
    assert "Scheduler at:" in site.read_logs()
    assert "tls://" in site.read_logs()
    assert "tcp://" not in site.read_logs()


@pytest.mark.usefixtures("secured")
def test_a_submitted_merge_talks_tls_with_its_workers(
    site: Site, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "{queue: normal, walltime: '00:10:00', log_directory: logs}"
    (site.folder / "my.yml").write_text(f"kind: slurm\nworkers: 1\nmemory: 64MiB\noptions: {options}\n")
    for name, value in site.slurm.make_environ().items():
        monkeypatch.setenv(name, value)
    words = ["submit", "a recipe.yml", "an out", "--cluster", "my.yml", "--shard-size", "tensor"]
    subprocess.run(["mergemill", *words], cwd=site.folder, check=True, capture_output=True)
    site.wait_for(lambda: site.out.exists() and not site.slurm.list_jobs())
    (log,) = [path.read_text() for path in site.folder.glob("logs/*.err")]
    assert hash_output(site.out) == expected, log
    assert "Registered to:      tls://" in log
    assert "tcp://" not in log


def check_goes_on(site: Site, left: Status, expected: dict[str, str]) -> None:
    """Fail unless the merge is finished now, with what was `left` of it made and no more, and its bytes are right."""
    now = status(site.out)
    assert now.state == "finished", site.read_logs()
    assert now.driver is not None
    assert now.driver.committed is not None
    assert 0 < now.driver.committed["redone_parts"] <= left.parts - left.parts_done < left.parts
    assert hash_output(site.out) == expected


def end_half_way(site: Site, number: str, *how: str, done: int = 0) -> Status:
    """End a job once it has done a part, and return what it leaves: a merge that was interrupted, and nothing else."""
    site.wait_for_a_part(done)
    site.slurm.call("scancel", *how, number)
    site.wait_for_end(number)
    left = status(site.out)
    assert left.state == "unfinished"
    assert left.driver is not None
    assert left.driver.how == "interrupted"
    assert f"go on with: {say_resume(left)}" in site.read_logs()
    return left


def do_as_told(left: Status, folder: Path) -> str:
    """Run, in some folder, the command that goes on with a merge; returns its job's number."""
    done = subprocess.run(["bash", "-c", say_resume(left)], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def test_a_job_that_is_ended_half_way_says_how_to_go_on_and_does(
    site: Site, expected: dict[str, str], tmp_path: Path
) -> None:
    site.set_pace(SLOW_S)
    first = site.submit()
    left = end_half_way(site, first, "--batch", "--signal=TERM")  # as before its time is over
    assert site.list_left(first) == set()
    second = do_as_told(left, tmp_path)
    left = end_half_way(site, second, done=left.parts_done)
    assert site.list_left(first, second) == set()
    site.set_pace(0)
    third = do_as_told(left, tmp_path)
    site.wait_for_end(third)
    check_goes_on(site, left, expected)
    assert site.list_left(first, second, third) == set()


def test_a_job_that_is_requeued_goes_on_by_itself(site: Site, expected: dict[str, str]) -> None:
    site.set_pace(SLOW_S)
    number = site.submit()
    site.wait_for_a_part()
    site.set_pace(0)
    site.slurm.call("scontrol", "requeue", number)
    site.wait_for(lambda: site.slurm.list_jobs().get(number) == "PENDING")
    left = status(site.out)
    assert left.state == "unfinished"
    site.slurm.call("scontrol", "update", f"JobId={number}", "StartTime=now")  # else 2 min later
    site.wait_for_end(number)
    check_goes_on(site, left, expected)
    assert site.list_left(number) == set()


def test_a_job_that_fails_says_so_and_ends_all_that_it_started(site: Site) -> None:
    (site.folder / "a recipe.yml").write_text("merge_method: none\n")
    number = site.submit()
    site.wait_for_end(number)
    assert " ExitCode=2:0" in site.slurm.call("scontrol", "show", "job", number)
    assert "a recipe.yml:1" in site.read_logs()
    site.wait_for(lambda: list_processes(site.folder) == [])
    assert site.list_left(number) == set()
    assert not site.out.exists()


def list_processes(folder: Path) -> list[str]:
    """Return the command lines of processes that name a folder."""
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]
