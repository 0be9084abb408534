"""A job's files to what the run works on, refused before any training when something is wrong with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_unlearn.config.job import DataPart, Job
from ray_unlearn.data.questions import Question, load_mmlu
from ray_unlearn.data.rows import check_cells, find_file, limit_documents, load_membership, load_pair
from ray_unlearn.data.tokens import document_of
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.metric_suite import check_in_run
from ray_unlearn.evaluation.spec import EvalSet
from ray_unlearn.files import file_digest
from ray_unlearn.records import Example
from ray_unlearn.schema import digest


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Rows, documents and questions of a run, and where they came from."""

    forget: list[Example]
    retain: list[Example]
    search_set: EvalSet
    """What trials and merges are scored on: half of the non-members."""
    final_set: EvalSet
    """What the chosen model is scored on: the other half, unseen until then."""
    digests: dict[str, str]
    dropped: dict[str, int]


def load_inputs(job: Job, benchmark: Path | None = None) -> Inputs:
    """All of a job's data; paths left null are those of the benchmark's folder."""
    data = job.data
    paths = {name: _path(data, name, benchmark) for name in ("forget", "retain", "mia_member", "mia_nonmember", "mmlu")}
    pair = dict(zip(("forget", "retain"), load_pair(paths["forget"], paths["retain"], data.skip_bad_rows), strict=True))
    limits = data.limit
    forget, retain = (limit_documents(loaded.examples, limits) for loaded in pair.values())
    check_cells(forget, retain)
    members, nonmembers = load_membership(paths["mia_member"], paths["mia_nonmember"], data.skip_bad_rows)
    if limits is not None:
        members = _members_of(members, forget)
    if data.mia_limit is not None:
        members, nonmembers = members[: data.mia_limit], nonmembers[: 2 * data.mia_limit]
    if len(nonmembers) < 2:
        raise InputError(
            f"{paths['mia_nonmember']} needs at least 2 documents: half are kept unseen, got {len(nonmembers)}."
        )
    dev, questions = load_mmlu(paths["mmlu"])
    questions = sample_questions(questions, job.mmlu.limit, job.seed)
    search, final = (
        EvalSet(
            forget=forget, retain=retain, members=members, nonmembers=nonmembers[part::2], dev=dev, questions=questions
        )
        for part in (0, 1)
    )
    check_in_run(job.evaluation.metrics, search)
    digests = {name: loaded.digest for name, loaded in pair.items()}
    digests |= {name: file_digest(find_file(paths[name], "mia")) for name in ("mia_member", "mia_nonmember")}
    digests["mmlu"] = digest([file_digest(path) for path in sorted(paths["mmlu"].glob("*/*.csv"))])
    dropped = {name: loaded.dropped for name, loaded in pair.items()}
    return Inputs(forget=forget, retain=retain, search_set=search, final_set=final, digests=digests, dropped=dropped)


def _path(data: DataPart, name: str, benchmark: Path | None) -> Path:
    given = getattr(data, name)
    if given is not None:
        return Path(given).expanduser()
    if benchmark is None:
        raise InputError(f"data.{name} is missing; give a file.")
    return benchmark / (name if name == "mmlu" else f"{name}.jsonl")


def _members_of(members: Sequence[str], forget: Sequence[Example]) -> list[str]:
    """The members whose row is still in the limited forget set: others were not trained on, hence are none."""
    documents = {document_of(example.input, example.output) for example in forget}
    kept = [member for member in members if member in documents]
    if not kept:
        raise InputError(
            "data.limit leaves no MIA member whose document is a forget row; raise the limit of the members' task."
        )
    return kept


def sample_questions(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """A fixed sample, subject after subject in turn, so that each is represented alike."""
    if limit is None or limit >= len(questions):
        return list(questions)
    rng = random.Random(seed)
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    queues = [rng.sample(queue, len(queue)) for queue in subjects.values()]
    rng.shuffle(queues)
    picked: list[Question] = []
    turn = 0
    while len(picked) < limit:
        picked += [queue[turn] for queue in queues if turn < len(queue)][: limit - len(picked)]
        turn += 1
    return picked
