"""Vision transformers of timm (ViT, DeiT) as training systems.

The stock timm model stays as it is but for its linear layers. The classifier `head` and the patch embedding
stay in full precision, unless `first_last_bits` says otherwise. The validation loss is the plain
cross-entropy in nats over all images, whatever smoothing or mixup the training loss uses.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from stableqat.errors import UserError, check_range, did_you_mean, first_line
from stableqat.modules.base import QATModule
from stableqat.modules.image_teacher import ImageTeacher, prepare_student
from stableqat.modules.metrics import MeanLoss, accuracies
from stableqat.modules.patches import WEIGHT, make_linear, with_ends
from stableqat.modules.start import compare_weights
from stableqat.modules.teacher import Distillation, load_frozen
from stableqat.modules.vit_config import architecture, unreachable, weight_file

logger = logging.getLogger(__name__)


class ViTModule(QATModule):
    """A quantized vision transformer.

    Args:
        model_name: Name of a timm ViT or DeiT. null takes, on the command line, that of the start.
        num_classes: Number of classes. null takes, on the command line, that of the data.
        model_args: Further arguments of the timm model, for example img_size, patch_size, in_chans,
            embed_dim, depth, num_heads, drop_rate, drop_path_rate. With a null model_name, null takes the
            start's.
        new_classifier: Whether to replace the start's classifier even if it has as many classes. null does
            so, on the command line, if the start's classes are known to have other names or another order.
        label_smoothing: Share of the target that the training loss spreads over all classes.
        mixup_alpha: Strength of mixup; 0 is off.
        cutmix_alpha: Strength of cutmix; 0 is off.
        first_last_bits: Quantize the patch embedding and the classifier too, to this width, with the
            quantizer's method and scales per row. Published results have 8 bits (LSQ, Q-ViT, OFQ) or, by
            default, full precision (PARQ) there.
        layer_lr_decay: Learning rate of a block as a share of the next one's (BEiT, arXiv 2106.08254), so
            that what is pretrained near the images changes least. 1 is off; fine-tuning usually takes 0.65 to
            0.85.
        skip: Linear layers that stay in full precision, by name patterns.
        options: Those of `QATModule`.

    Raises:
        UserError: If the model is unknown or a setting does not fit it.
    """

    family = "images"
    input_key = "pixel_values"
    heads = ("head", "head_dist")
    attention_has = "fused_attn"

    def __init__(
        self,
        *,
        model_name: str | None = "deit_small_patch16_224",
        num_classes: int | None = 1000,
        model_args: dict[str, Any] | None = None,
        new_classifier: bool | None = None,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        first_last_bits: int | None = None,
        layer_lr_decay: float = 1.0,
        skip: Sequence[str] = heads,
        **options: Any,
    ) -> None:
        super().__init__(skip=skip, **options)
        if model_name is None:
            raise UserError(
                "model.model_name: missing; name a timm model, such as vit_small_patch16_224, or set "
                "model.init_from to take its own"
            )
        if num_classes is None:
            raise UserError("model.num_classes: missing; give the number of classes of the data")
        if num_classes < 2:
            raise UserError(f"model.num_classes: must be at least 2, not {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing: must lie in [0, 1), not {label_smoothing}")
        if not 0 < layer_lr_decay <= 1:
            raise UserError(f"model.layer_lr_decay: must lie in (0, 1], not {layer_lr_decay}")
        check_range("model.first_last_bits", first_last_bits, 2, 8, null=True)
        self.first_last_bits = None if self.quantizer is None else first_last_bits
        if self.quantizer is not None and self.first_last_bits is not None:
            self.quantizer = with_ends(self.quantizer, self.first_last_bits)
            self.skip = () if tuple(skip) == self.heads else skip
        self.model_name = model_name
        self.num_classes = num_classes
        self.model_args = model_args or {}
        self.new_classifier = new_classifier
        self.label_smoothing = label_smoothing
        self.layer_lr_decay = layer_lr_decay
        self.mixup = _mixup(mixup_alpha, cutmix_alpha, label_smoothing, num_classes)
        self._new_head = False  # instead of the start's
        self.check_architecture(self.quantizer)
        self.val_loss = MeanLoss()
        self.accuracies = MetricCollection({**accuracies(num_classes)}, compute_groups=False)

    def build_model(self) -> nn.Module:
        """See `QATModule.build_model`."""
        return self._with_patches(self._build())

    def _with_patches(self, model: nn.Module) -> nn.Module:
        if self.first_last_bits is not None:
            make_linear(model)
        return model

    def _build(self) -> nn.Module:
        import timm

        if ":" in self.model_name:
            raise UserError(
                f"model.model_name: {self.model_name} is a location, not a timm model; set model.init_from "
                "to it and model_name to the architecture"
            )
        try:
            model = timm.create_model(
                self.model_name, pretrained=False, num_classes=self.num_classes, **self.model_args
            )
        except (RuntimeError, TypeError, AssertionError, ValueError, LookupError, OSError) as error:
            if not timm.is_model(self.model_name):
                known = timm.list_models(["vit_*", "deit*"])
                hint = did_you_mean(self.model_name, known, "timm.list_models() lists all")
                raise UserError(f"model.model_name: {first_line(error)}; {hint}") from error
            raise UserError(
                f"model.model_args: timm cannot build {self.model_name} with {self.model_args}: {error}"
            ) from error
        return model.train()

    def load_pretrained(self, source: str) -> nn.Module:
        """See `QATModule.load_pretrained`: a local weight file, or a timm model of the hub."""
        import timm

        if (path := weight_file(source)) is not None:
            return _load_file(self, path)
        try:
            model: Any = timm.create_model(
                f"hf-hub:{source}", pretrained=True, num_classes=self.num_classes, **self.model_args
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise unreachable(source, error) from error
        self._new_head = self.new_classifier or model.pretrained_cfg.get("num_classes") != self.num_classes
        if self.new_classifier:
            model.reset_classifier(self.num_classes)
        return self._with_patches(model.train())

    def check_pretrained(self, source: str) -> None:
        """See `QATModule.check_pretrained`: a local file must fit, or the Hub's model be reachable."""
        import timm

        if (path := weight_file(source)) is None:
            try:
                timm.models.load_model_config_from_hf(source)
            except (OSError, RuntimeError, ValueError) as error:
                raise unreachable(source, error) from error
        elif path.suffix not in (".npz", ".npy"):  # timm alone knows what their names mean
            with _readable(path):
                state = timm.models.load_state_dict(str(path), weights_only=True)
                with torch.device("meta"):
                    model = self.build_model()
                compare_weights(model, self.fit_state(model, state, str(path)), str(path))

    def load_teacher(self, settings: Distillation) -> ImageTeacher:
        """See `QATModule.load_teacher`: the architecture that the source names, or the student's."""
        assert settings.source is not None
        name, options = architecture(settings.source, "teacher.source") or (self.model_name, self.model_args)
        if size := self.model_args.get("img_size"):
            options = {**options, "img_size": size}
        classes = self.num_classes
        made: Any = load_frozen(
            lambda: ViTModule(
                model_name=name, model_args=options, num_classes=classes, init_from=settings.source
            )
        )
        if settings.weight and made._new_head:
            raise UserError(
                f"teacher.source: {settings.source} has no classifier of the {classes} classes to learn "
                "from; train it in full precision first and name that run, or set teacher.weight to 0 and "
                "teacher.hidden_weight above 0"
            )
        return ImageTeacher(made.model, settings)

    def adapt(self, model: nn.Module) -> None:
        """See `QATModule.adapt`: a student shows its teacher what they compare."""
        if self.distillation is not None:
            prepare_student(model)

    def lr_factors(self, model: nn.Module) -> dict[str, float]:
        """See `QATModule.lr_factors`: each block's is `layer_lr_decay` of the next one's."""
        if self.layer_lr_decay == 1:
            return {}
        from timm.models import group_parameters

        matcher = model.group_matcher(coarse=False)  # type: ignore[operator]
        places: dict[str, int] = group_parameters(model, matcher, reverse=True)
        return {name: self.layer_lr_decay ** (max(places.values()) - place) for name, place in places.items()}

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Transformer blocks."""
        return model.blocks  # type: ignore[return-value]

    def fit_state(self, model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """See `QATModule.fit_state`: fit classifier, positions and patches to the model."""
        own, state, told = model.state_dict(), dict(state), []
        if WEIGHT in own and WEIGHT in state and own[WEIGHT].numel() == state[WEIGHT].numel():
            state[WEIGHT] = state[WEIGHT].reshape(own[WEIGHT].shape)  # a convolution's, or a linear layer's
        names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
        heads = [f"{name}.{part}" for name in ([names] if isinstance(names, str) else names)
                 for part in ("weight", "bias")]  # fmt: skip
        for key in heads:
            same = key in state and key in own and state[key].shape == own[key].shape
            if key in own and (self.new_classifier or not same):
                had = f"one of {len(state[key])}{' others' if same else ''}" if key in state else "none"
                state[key] = own[key]
                self._new_head = True
                told.append(f"a new classifier of {self.num_classes} classes (the start has {had})")
        if (resampled := _resampled(model, state)) is not None:
            state["pos_embed"], sizes = resampled
            told.append(f"positions resampled {sizes}")
        if told:
            logger.info("init_from: %s: %s", source, ", ".join(dict.fromkeys(told)))
        return state

    def chance(self) -> float | None:
        """See `QATModule.chance`: all classes alike, less a margin for classifiers that know little."""
        return None if self._new_head else 0.99 * math.log(self.num_classes)

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Images must have the model's size and channels; mixup needs even batches."""
        if self.mixup is not None and getattr(datamodule, "batch_size", 0) % 2:
            raise UserError(
                "data.batch_size: must be even, as mixup and cutmix pair images; change it or turn them off"
            )
        with torch.device("meta"):
            size = image_size(self.build_model())
        wanted = {"image_size": size, "in_chans": self.model_args.get("in_chans", 3)}
        for key, value in wanted.items():
            given = getattr(datamodule, key, None)
            if given is not None and value is not None and given != value:
                name = "img_size" if key == "image_size" else key
                raise UserError(
                    f"model.model_args.{name}: the model takes {value}, but the data has {key} {given}; set "
                    "it, or use model_name's own architecture with --model.model_args null"
                )

        if getattr(datamodule, "source", None) is None:  # the embedded set needs no preparation
            self._check_classes(datamodule)

    def setup(self, stage: str) -> None:
        """See `QATModule.setup`; also check the classes, now that the data is prepared."""
        super().setup(stage)
        self._check_classes(getattr(self.trainer, "datamodule", None))

    def _check_classes(self, datamodule: L.LightningDataModule | None) -> None:
        found = getattr(datamodule, "num_classes", None)
        if found is not None and found != self.num_classes:
            raise UserError(
                f"model.num_classes: the model has {self.num_classes} classes, but the data has {found}; "
                f"set it to {found}"
            )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`(batch, channels, height, width)` images to `(batch, classes)` logits."""
        assert self.model is not None
        return self.model(pixel_values)

    def augment(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Training.augment`: mixup and cutmix, whose labels are probabilities, smoothed already."""
        if self.mixup is None:
            return batch
        images, targets = self.mixup(batch["pixel_values"].clone(), batch["labels"])  # mixes in place
        return {"pixel_values": images, "labels": targets}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of classes, with label smoothing where it is on, or of probabilities.

        A teacher adds what `ImageTeacher.loss` says.
        """
        images, labels = batch["pixel_values"], batch["labels"]
        smoothing = 0.0 if labels.is_floating_point() else self.label_smoothing
        if self.teacher is not None:
            loss: Tensor = self.teacher.loss(self.model, batch, smoothing)
            return loss
        return F.cross_entropy(self(images), labels, label_smoothing=smoothing)

    def example_batch(self, rows: int, *, tokens: int = 64, seed: int = 0) -> dict[str, Tensor]:
        """See `QATModule.example_batch`."""
        with torch.device("meta"):
            model: Any = self.build_model()
        size = self.model_args.get("img_size") or getattr(
            getattr(model, "patch_embed", None), "img_size", None
        )
        size = size or model.pretrained_cfg["input_size"][1:]
        size = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(rows, self.model_args.get("in_chans", 3), *size, generator=generator)
        labels = torch.randint(self.num_classes, (rows,), generator=generator)
        return {"pixel_values": images, "labels": labels}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sum loss and accuracies over the images that are not padding."""
        logits, labels = self(batch["pixel_values"]).float(), batch["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        self.val_loss.update(loss.double().sum(), (labels != -100).sum(), batch_idx)
        self.accuracies.update(logits, labels)

    def measured(self, loss: Tensor) -> dict[str, Tensor]:
        """Accuracies over all images."""
        return self.accuracies.compute()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities, `(batch, classes)`."""
        return self(batch["pixel_values"]).float().softmax(-1)


def image_size(model: Any) -> int | None:
    """Height in pixels of the images that a timm model takes; None if it takes any."""
    patches = getattr(model, "patch_embed", None)
    strict = getattr(patches, "strict_img_size", True) and not getattr(model, "dynamic_img_size", False)
    size = getattr(patches, "img_size", None)
    return int(size[0]) if size and strict else None


def _resampled(model: Any, state: dict[str, Tensor]) -> tuple[Tensor, str] | None:
    """Position embeddings on the model's grid of patches, and both grids in words; None to leave them."""
    given, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if given is None or own is None or given.shape == own.shape or given.ndim != 3:
        return None
    from timm.layers import resample_abs_pos_embed

    first = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side, new = math.isqrt(given.shape[1] - first), list(model.patch_embed.grid_size)
    if side * side + first != given.shape[1] or given.shape[2] != own.shape[2]:
        return None  # another architecture: the comparison of weights says so
    made = resample_abs_pos_embed(given.float(), new, num_prefix_tokens=first)
    return made, f"from {side}x{side} to {new[0]}x{new[1]} patches"


def _load_file(module: ViTModule, path: Path) -> nn.Module:
    import timm

    model = module._build()

    def same(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        state = module.fit_state(model, state, str(path))
        compare_weights(model, state, str(path))
        return state

    with _readable(path):
        timm.models.load_checkpoint(model, str(path), filter_fn=same, weights_only=True)
    return module._with_patches(model)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Report in one line that a weight file is damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        reason = first_line(error).split(". ")[0]  # torch then guesses at causes
        raise UserError(
            f"init_from: {path} is damaged, or holds more than weights ({reason}); take another copy"
        ) from error


def _mixup(mixup: float, cutmix: float, smoothing: float, classes: int) -> Any:
    if mixup < 0 or cutmix < 0:
        raise UserError("model.mixup_alpha, model.cutmix_alpha: must be 0 or more")
    if mixup == cutmix == 0:
        return None
    from timm.data import Mixup

    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)
