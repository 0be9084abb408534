"""What the package asks of objects that other libraries make: models, tokenizers, trials. Loads none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module, Parameter


class ModelConfig(Protocol):
    """The part of a Hugging Face configuration that all causal models share."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    def get_text_config(self) -> ModelConfig:
        """The configuration of the language model, where a model has other parts too."""

    def to_dict(self) -> dict[str, Any]:
        """All settings by their names."""


class LMOutput(Protocol):
    """What a forward pass returns."""

    logits: Tensor
    past_key_values: Any
    """Absent in models that keep their state elsewhere."""


class CausalLM(Protocol):
    """A causal language model of transformers, with or without PEFT's adapters around it."""

    config: ModelConfig
    training: bool

    def __call__(self, **inputs: Any) -> LMOutput:
        """A forward pass."""

    def generate(self, inputs: Tensor, **options: Any) -> Tensor:
        """transformers' own decoding."""

    def get_input_embeddings(self) -> Module:
        """The token embeddings."""

    def get_output_embeddings(self) -> Module | None:
        """The output head."""

    def parameters(self) -> Iterator[Parameter]:
        """All parameters."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their names."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """All buffers with their names."""

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """All modules with their names."""

    def get_parameter(self, target: str) -> Parameter:
        """A parameter by its name."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Parameters and buffers, tied ones under each name."""

    def train(self, mode: bool = True) -> Self:
        """Training mode, or not."""

    def eval(self) -> Self:
        """Evaluation mode."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether all parameters are trained."""

    def to(self, device: torch.device | str) -> Self:
        """The model on a device."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a model directory."""


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    pad_token_id: int
    eos_token_id: int | None

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> Mapping[str, Any]:
        """`input_ids` of a text, or of several."""

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of ids."""

    def save_pretrained(self, directory: str | Path) -> object:
        """Writes the tokenizer into a model directory."""

    def __len__(self) -> int:
        """Entries of the vocabulary, added ones included."""


class Suggests(Protocol):
    """Optuna's suggest methods, as a search space sees a trial."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number between low and high."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from low to high."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""


Log = Callable[[str], None]
"""Takes a line that a person is to read."""
