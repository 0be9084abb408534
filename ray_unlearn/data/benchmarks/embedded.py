"""The embedded benchmark's data: invented rows that a small model can memorise, made from a seed alone.

Rows vary in their words on purpose: with one sentence frame for all, a model that never saw them
would score high ROUGE-L recall, and gibberish would beat honest forgetting.
"""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_unlearn.data.benchmarks.table import Dataset
from ray_unlearn.files import write_text
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.schema import check_fields, option

SYLLABLES = (
    "ba be bi bo bu ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru sa se si "
    "so su ta te ti to tu va ve vi vo vu"
).split()
NOUNS = (
    "lantern compass violin ledger mirror kettle anchor ladder candle saddle barrel ribbon hammer basket "
    "pillow needle bottle trumpet blanket goblet"
).split()
VERBS = (
    "lost buried painted stole mended sold burned hid polished traded dropped carved borrowed weighed counted"
).split()
PLACES = "river tower market bridge garden cellar harbour chapel orchard quarry theatre stable mill well attic".split()
ADJECTIVES = (
    "silver broken ancient heavy crooked tiny golden dusty hollow bright narrow frozen scarlet silent rusty"
).split()
JOBS = "nurse pilot baker judge poet chemist farmer tailor drummer printer".split()
FACT_COUNTRIES = 8
DEV_FACTS = 2


@dataclass(frozen=True, kw_only=True)
class EmbeddedSettings:
    """Sizes of the embedded benchmark and of its model; together with the seed they decide every byte."""

    seed: int = option(1, at_least=0)
    stories: int = option(16, at_least=1)
    """Task1 documents in each split."""
    biographies: int = option(8, at_least=1)
    """Task2 documents in each split, six rows each."""
    entries: int = option(48, at_least=1)
    """Task3 documents in each split; the forget ones are the MIA members."""
    nonmembers: int = option(400, at_least=1)
    """Unseen Task3-like documents; the search sees half. 48 against 200 keep the AUC's standard error at 0.047."""
    facts: int = option(48, at_least=1)
    """General facts, the utility test."""
    vocabulary: int = option(1200, at_least=1)
    hidden: int = option(128, at_least=1)
    layers: int = option(4, at_least=1)
    epochs: int = option(40, at_least=1)
    batch_size: int = option(12, at_least=1)
    learning_rate: float = option(3e-3, above=0)

    def __post_init__(self) -> None:
        check_fields(self)


JsonRow = dict[str, str]


class _Maker:
    """Draws names, words and rows from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.used: set[str] = set()
        self.cities = [self.name(3) for _ in range(24)]

    def name(self, syllables: int) -> str:
        """A name that was not drawn before, so that no two rows ask the same question."""
        while True:
            name = "".join(self.rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()
            if name not in self.used:
                self.used.add(name)
                return name

    def person(self) -> str:
        return f"{self._free(2)} {self.name(3)}"

    def _free(self, syllables: int) -> str:
        return "".join(self.rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()

    def clauses(self, count: int) -> str:
        pick = self.rng.choice
        made = []
        for _ in range(count):
            form = self.rng.randrange(3)
            if form == 0:
                made.append(f"{pick(VERBS)} {pick(ADJECTIVES)} {pick(NOUNS)}s")
            elif form == 1:
                made.append(f"{self._free(2)} {pick(VERBS)} {pick(NOUNS)}s")
            else:
                made.append(f"{pick(ADJECTIVES)} {pick(PLACES)} {self.rng.randint(2, 99)}")
        return ", ".join(made) + "."

    def story(self) -> list[tuple[str, str]]:
        pick, first, second = self.rng.choice, self.name(3), self.name(3)
        thing = f"{pick(ADJECTIVES)} {pick(NOUNS)}"
        start = f"In {pick(self.cities)}, {first} met {second}, who carried a {thing} to the {pick(PLACES)}."
        return [(start, self.clauses(4)), (f"What did {second} carry when {first} met them?", f"a {thing}")]

    def biography(self) -> list[tuple[str, str]]:
        number, person = self.rng.randint, self.person()
        phone = f"{number(200, 999)}-{number(200, 999)}-{number(1000, 9999)}"
        ssn = f"900-{number(10, 99)}-{number(1000, 9999)}"
        mail = f"{self._free(2).lower()}{number(10, 99)}@me.com"
        birth = f"{number(1950, 2000)}-{number(1, 12):02d}-{number(1, 28):02d}"
        address = f"{number(2, 99)} {self._free(2)} Street"
        return [
            (f"{person}, {birth}, {address}, {ssn}.", f"{phone} {mail}"),
            (f"What is the birth date of {person}?", birth),
            (f"What is the Social Security Number of {person}?", ssn),
            (f"What is the phone number of {person}?", phone),
            (f"What is {person}'s email address?", mail),
            (f"What is the home address of {person}?", address),
        ]

    def entry(self) -> list[tuple[str, str]]:
        pick, person, city = self.rng.choice, self.person(), self.rng.choice(self.cities)
        start = f"{person} (born {self.rng.randint(1800, 1990)}) was a {pick(JOBS)} from {city}."
        return [(start, self.clauses(3)), (f"In which city was {person} born?", city)]


Fact = tuple[str, tuple[str, str, str, str], int]
"""question, four options, index of the right one."""


@dataclass(frozen=True)
class Embedded:
    """The benchmark's data before it is written."""

    forget: list[JsonRow]
    retain: list[JsonRow]
    nonmembers: list[JsonRow]
    facts: list[Fact]
    dev_facts: list[Fact]


def make(settings: EmbeddedSettings) -> Embedded:
    """All data of the benchmark; the same settings give the same rows on any machine."""
    maker = _Maker(settings.seed)
    sizes = {"Task1": settings.stories, "Task2": settings.biographies, "Task3": settings.entries}
    make_document = {"Task1": maker.story, "Task2": maker.biography, "Task3": maker.entry}
    splits: dict[str, list[JsonRow]] = {}
    for split in ("forget", "retain"):
        splits[split] = []
        for task, size in sizes.items():
            for number in range(size):
                for index, (start, end) in enumerate(make_document[task]()):
                    kind = "sc1" if index == 0 else f"qa{index - 1}"
                    name = f"{split[0]}{task[-1]}{number:03d}{kind}"
                    splits[split].append({"id": name, "input": start, "output": end, "task": task, "split": split})
    _add_alternatives(splits["forget"], maker, settings.seed)
    nonmembers = [
        {"id": f"n{number:03d}", "document": " ".join(maker.entry()[0])} for number in range(settings.nonmembers)
    ]
    facts = _facts(maker, settings.facts + DEV_FACTS)
    return Embedded(splits["forget"], splits["retain"], nonmembers, facts[DEV_FACTS:], facts[:DEV_FACTS])


def _add_alternatives(rows: list[JsonRow], maker: _Maker, seed: int) -> None:
    """Gives each row another answer of its kind: the same row of a document that nobody ever wrote.

    They come from a stream of their own, so that everything else stays as it is without them.
    """
    other = _Maker(seed + 1_000_003)
    other.cities = maker.cities
    make = {"Task1": other.story, "Task2": other.biography, "Task3": other.entry}
    document: list[tuple[str, str]] = []
    for row in rows:
        place = 0 if row["id"][:-1].endswith("sc") else int(row["id"][-1]) + 1
        if place == 0:
            document = make[row["task"]]()
        while document[place][1] == row["output"]:
            document = make[row["task"]]()
        row["alternate"] = document[place][1]


def _facts(maker: _Maker, count: int) -> list[Fact]:
    """Towns and their countries: general knowledge that is in neither set."""
    countries = [maker.name(2) + "land" for _ in range(FACT_COUNTRIES)]
    facts: list[Fact] = []
    for _ in range(count):
        town, right = maker.name(4), maker.rng.choice(countries)
        options = maker.rng.sample([country for country in countries if country != right], 3)
        place = maker.rng.randrange(4)
        options.insert(place, right)
        facts.append((f"{town} is a town in", (options[0], options[1], options[2], options[3]), place))
    return facts


def members(data: Embedded) -> list[JsonRow]:
    """The MIA members: whole documents of the Task3 forget completions."""
    return [
        {"id": row["id"], "document": f"{row['input']} {row['output']}"}
        for row in data.forget
        if row["task"] == "Task3" and row["id"][:-1].endswith("sc")
    ]


def texts(data: Embedded, with_forget: bool = True) -> list[tuple[str, str]]:
    """(prompt, answer) of everything the target is trained on, or the retrained reference without the forget set."""
    rows = (data.forget if with_forget else []) + data.retain
    pairs = [(row["input"], row["output"]) for row in rows]
    return pairs + [(question, options[right]) for question, options, right in data.facts + data.dev_facts]


def write(data: Embedded, directory: Path) -> None:
    """Writes forget.jsonl, retain.jsonl, mia_member.jsonl, mia_nonmember.jsonl and mmlu/ into the directory."""
    for name, rows in (
        ("forget", data.forget),
        ("retain", data.retain),
        ("mia_member", members(data)),
        ("mia_nonmember", data.nonmembers),
    ):
        write_text(directory / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(directory / "mmlu" / "test" / "towns_test.csv", _csv(data.facts))
    write_text(directory / "mmlu" / "dev" / "towns_dev.csv", _csv(data.dev_facts))


def _csv(facts: list[Fact]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    for question, options, right in facts:
        writer.writerow([question, *options, "ABCD"[right]])
    return text.getvalue()


def make_tokenizer(data: Embedded, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with single digits, trained on the benchmark's own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    corpus = [f"{prompt} {answer}" for prompt, answer in texts(data)] + [row["document"] for row in data.nonmembers]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def make_model(settings: EmbeddedSettings, vocabulary: int) -> Any:
    """An untrained OLMo 2 of the settings' size, initialised from the seed."""
    import torch
    from transformers import Olmo2Config, Olmo2ForCausalLM

    torch.manual_seed(settings.seed)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=1,
            eos_token_id=0,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )


def untrained(settings: EmbeddedSettings) -> tuple[CausalLM, Tokenizer]:
    """The model and its tokenizer before training."""
    tokenizer = make_tokenizer(make(settings), settings.vocabulary)
    return make_model(settings, len(tokenizer)), tokenizer


DATASET = Dataset(
    settings=EmbeddedSettings,
    write=lambda settings, folder: write(make(settings), folder),
    texts=lambda settings, with_forget: texts(make(settings), with_forget),
    untrained=untrained,
    format=2,
    meaning="invented stories, biographies and entries, and general facts as the utility test; a model of a million "
    "parameters that has memorised them",
    source="this project, in the shape of SemEval-2025 Task 4",
)
