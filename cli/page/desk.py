"""What the page does when it is asked: looks, starts, ends, shows."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from mergemill.cli.page import jobs, results, runs, shelf
from mergemill.cli.page.answers import Given, take_text
from mergemill.cli.page.catalogue import make_catalogue
from mergemill.cli.page.form import parse_form, write_form
from mergemill.cli.page.look import check_text, is_reportable, look, make_crew, plan_text
from mergemill.cli.page.roots import check_model, check_out
from mergemill.cli.page.settings import Setup, parse_chosen
from mergemill.engine import abort, check_output, errors

TICKET_S = 60.0  # for which a report may be opened after it was asked for


class Desk:
    """What the page knows between requests: nothing that a restart would lose."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._watch = runs.OutputWatch()
        self._tickets: dict[str, tuple[float, Path]] = {}

    def list_questions(self) -> dict[str, Callable[[Given], Any]]:
        """Return what is only asked."""
        return {
            "start": self.tell_start,
            "models": lambda given: self._watch.list_models(self._setup.root),
            "facts": lambda given: shelf.describe_model(self._setup.root, take_text(given, "model")),
            "hub": lambda given: shelf.search_hub(take_text(given, "words")),
            "runs": lambda given: runs.list_runs(self._setup.root, self._watch),
            "run": lambda given: self._describe(self._find(given)),
            "result": lambda given: results.describe_result(self._setup.root, self._find(given)),
        }

    def list_orders(self) -> dict[str, Callable[[Given], Any]]:
        """Return what is done, or may be long."""
        return {
            "look": self.look,
            "write": lambda given: {"text": write_form(take_text(given, "text"), parse_form(given.get("form") or {}))},
            "merge": self.merge,
            "compare": self.compare,
            "push": self.push,
            "cancel": lambda given: self._cancel(self._find(given)),
            "resume": lambda given: self._resume(self._find(given)),
            "abort": lambda given: self._abort(self._find(given)),
            "show": self.make_ticket,
        }

    def tell_start(self, given: Given) -> dict[str, Any]:
        """Return what a browser is told once."""
        from importlib.metadata import version
        from importlib.util import find_spec

        return {
            "version": version("mergemill"),
            "root": str(self._setup.root),
            "where": self._setup.scheduler or self._setup.cluster,
            "pictures": find_spec("vl_convert") is not None,
            "hub": find_spec("huggingface_hub") is not None,
            **make_catalogue(self._setup.methods),
        }

    def look(self, given: Given) -> dict[str, Any]:
        """Return what a recipe means now."""
        try:
            chosen = parse_chosen(given)
            out = take_text(given, "out", "")
            out = check_out(self._setup.root, out) if out.strip() else ""
        except errors.InputError as error:
            return {**look(take_text(given, "text"), "", parse_chosen({}), self._setup), "option_error": str(error)}
        told = look(take_text(given, "text"), out, chosen, self._setup)
        if out and "://" not in out and self._watch.look(out) is not None:
            told["option_error"] = _say_taken(out)
        return told

    def merge(self, given: Given) -> dict[str, Any]:
        """Start a merge that can be planned, into a place where none is."""
        root, text, chosen = self._setup.root, take_text(given, "text"), parse_chosen(given)
        if not (out := take_text(given, "out", "")):
            raise errors.OutputError("name the output: a new folder below the root, s3://bucket/name or hf://org/name")
        out = check_out(root, out)
        self._check_free(out)
        plan = plan_text(text, chosen, self._setup)
        check_output(plan, out, **make_crew(chosen, self._setup))
        report = bool(given.get("report")) and is_reportable(plan)
        with jobs.hold_starts(self._setup.root):
            self._check_free(out)
            return {"id": jobs.start_merge(self._setup, text, out, chosen, report=report).name}

    def compare(self, given: Given) -> dict[str, Any]:
        """Start a comparison of two models, or of what both changed of a third."""
        words = [take_text(given, key) for key in ("first", "second")]
        words += [base] if (base := take_text(given, "base", "")) else []
        for word in words:
            check_model(self._setup.root, word)
            _check_word(word)
        return {"id": self._start_other(jobs.COMPARE, words[0], words)}

    def push(self, given: Given) -> dict[str, Any]:
        """Start to publish a finished merge on the Hub."""
        job, repository = self._find(given), take_text(given, "repository")
        _check_word(repository)
        state = self._describe(job)["state"]
        if not results.is_pushable(job, state):
            raise errors.InputError(f"{job.out}: only a finished merge is published")
        public = ["--public"] if given.get("public") is True else []
        return {"id": self._start_other(jobs.PUSH, job.out, [repository, *public])}

    def make_ticket(self, given: Given) -> dict[str, str]:
        """Return an address that shows a run's report once, soon: a new tab has no token."""
        path = results.find_report(self._setup.root, self._find(given))
        if path is None:
            raise errors.InputError("this run has no report")
        ticket, now = secrets.token_urlsafe(24), time.monotonic()
        self._tickets = {key: value for key, value in self._tickets.items() if value[0] > now}
        self._tickets[ticket] = now + TICKET_S, path
        return {"address": f"/shown/{ticket}"}

    async def show_report(self, request: Request) -> Response:
        """Answer with the report that a ticket is for."""
        until, path = self._tickets.pop(request.path_params["ticket"], (0.0, Path()))
        if until < time.monotonic():
            return JSONResponse({"message": "this address was for once; open the report from its run again"}, 404)
        return FileResponse(path, media_type="text/html")

    def _find(self, given: Given) -> "jobs.Errand":
        return runs.find_job(self._setup.root, take_text(given, "id"), self._watch)

    def _describe(self, job: "jobs.Errand") -> dict[str, Any]:
        return runs.describe_run(self._setup.root, job, self._watch)

    def _check_free(self, out: str) -> None:
        self._watch.forget(out)
        job = jobs.read_job(self._setup.root, jobs.make_name(jobs.MERGE, out))
        if self._watch.look(out) is not None or (job is not None and jobs.is_alive(job)):
            raise errors.OutputError(_say_taken(out))

    def _start_other(self, kind: str, out: str, words: list[str]) -> str:
        with jobs.hold_starts(self._setup.root):
            job = jobs.read_job(self._setup.root, jobs.make_name(kind, out, *words))
            if job is not None and jobs.is_alive(job):
                return job.name
            return jobs.start_other(self._setup, kind, out, words).name

    def _cancel(self, job: "jobs.Errand") -> dict[str, Any]:
        if job.kind == jobs.MERGE:
            runs.cancel(job, self._watch)
        else:
            jobs.end(job)
        return {}

    def _resume(self, job: "jobs.Errand") -> dict[str, Any]:
        if not job.started:
            raise errors.InputError("this merge was not started here; its run shows the command that resumes it")
        if job.kind == jobs.MERGE:
            check_text(jobs.read_recipe(self._setup.root, job.name), self._setup)
        with jobs.hold_starts(self._setup.root):
            jobs.resume(self._setup, job)
        self._watch.forget(job.out)
        return {}

    def _abort(self, job: "jobs.Errand") -> dict[str, Any]:
        """Remove what a stopped merge has left, and the notes of a run that has ended; a finished output stays."""
        if jobs.is_alive(job):
            raise errors.InputError("it runs; cancel it first")
        if job.kind == jobs.MERGE and (found := self._watch.look(job.out)) and found.state == "unfinished":
            abort(job.out)
        jobs.forget(self._setup.root, job.name)
        self._watch.forget(job.out)
        return {}


def _say_taken(out: str) -> str:
    return f"{out}: a merge is there already; see its run, or name another place"


def _check_word(word: str) -> None:
    if word.startswith("-"):
        raise errors.InputError(f"{word}: begins as an option does; write ./{word}")
