"""Checkpoints that rebuild their module: safely, through any of its classes, and without fetching weights again."""

from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.saving import _load_from_checkpoint

from zoo.core.errors import UserError
from zoo.core.recording import Recorded, describable, import_path, without_weights


class Persistent(Recorded, LightningModule):
    """A module whose hyperparameters are the plain description of its constructor's arguments.

    Attributes:
        vocabulary: of a loaded text model, the contents of its ``tokenizer.json``.
    """

    vocabulary: str | None = None

    def recorded(self) -> None:
        """Keep the constructor's arguments as plain hyperparameters, in the form of the command line's own."""
        given = _given_hyperparameters.get()  # what the command line, or a reload through it, was told
        path = {} if "<locals>" in type(self).__qualname__ else {"_class_path": import_path(type(self))}
        own = {**path, **self.constructor, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
        self._set_hparams({**(given or own), **path})
        self._hparams_initial = {key: value for key, value in self._hparams.items() if not key.startswith("_")}

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds this module: ``{"class_path", "init_args"}``, without references to pretrained weights."""
        arguments = {key: value for key, value in self.hparams.items() if not key.startswith("_")}
        return {"class_path": import_path(type(self)), "init_args": without_weights(arguments)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop references to pretrained weights: the state dict holds them, and reloading must not fetch them."""
        key = self.CHECKPOINT_HYPER_PARAMS_KEY
        checkpoint[key] = without_weights(dict(checkpoint.get(key, {})))
        checkpoint["unrecorded"] = list(self.unrecorded)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take from the checkpoint the description of what a reload built, so that it can be saved again."""
        recorded = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        described = {name: recorded[name] for name in self.unrecorded if describable(recorded.get(name, ...))}
        self._set_hparams(described)
        self.unrecorded = tuple(name for name in self.unrecorded if name not in described)
        data = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        # Lightning asks only a data module of the class that wrote the checkpoint.
        vocabulary = None if type(data).__qualname__ in checkpoint else vocabulary_of(checkpoint)
        if data is not None and vocabulary is not None and hasattr(data, "source"):
            data.load_state_dict({"vocabulary": vocabulary})

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, strict: bool | None = None, **kwargs: Any
    ) -> Self:
        """Rebuild the recorded class, which must be this one or a subclass of it, with the checkpoint's weights.

        Args:
            checkpoint_path: a checkpoint file.
            map_location: where tensors go, as in :func:`torch.load`.
            strict: whether the checkpoint's tensors must be exactly the module's; yes unless the class says otherwise.
            **kwargs: constructor arguments that replace recorded ones.

        Raises:
            TypeError: if the checkpoint is of another class.
            UserError: if an argument had no plain description, such as a lambda, and is not given again.
        """
        # Through LightningModule, because Lightning drops the recorded class where `__init__` has no **kwargs.
        if not kwargs.pop("weights_only", True):
            raise UserError("weights_only=False: a checkpoint never runs code here; these load with weights_only=True")
        try:
            loaded = _load_from_checkpoint(
                LightningModule, checkpoint_path, map_location, strict=strict, weights_only=True, **kwargs
            )
        except (ArgumentError, TypeError) as error:
            if missing := _unrecorded(checkpoint_path) - set(kwargs):
                names = ", ".join(sorted(missing))
                raise UserError(
                    f"{checkpoint_path}: give {names} again, as the checkpoint has no description"
                ) from error
            raise
        if not isinstance(loaded, cls):
            raise TypeError(f"{checkpoint_path} holds a {type(loaded).__name__}, which is not a {cls.__name__}")
        return loaded

    def save_pretrained(self, directory: Any) -> None:
        """Write weights (safetensors), configuration and model card: see :func:`zoo.hub.save_pretrained`."""
        from zoo.hub import save_pretrained

        save_pretrained(cast(Any, self), directory)


def vocabulary_of(checkpoint: Mapping[str, Any]) -> str | None:
    """The fingerprint of the vocabulary that a checkpoint's data had, ``None`` where they were no texts."""
    states = (state for key, state in checkpoint.items() if key not in ("state_dict", "hyper_parameters"))
    found = (state.get("vocabulary") for state in states if isinstance(state, Mapping))
    return next((name for name in found if isinstance(name, str)), None)


def _unrecorded(checkpoint_path: Any) -> set[str]:
    return set(torch.load(checkpoint_path, map_location="meta", weights_only=True).get("unrecorded", ()))
