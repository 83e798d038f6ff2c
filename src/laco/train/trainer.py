"""The objective and the optimiser on top of the Hugging Face Trainer: groups, dense labels, distillation."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer

from laco.errors import LacoError
from laco.families import family_of
from laco.families.compat import encode_pictures, given_features
from laco.families.reduction.lesson import LESSON, Lesson, Taught
from laco.families.reduction.prompt import ANSWERS, within
from laco.methods.spvit import distillation
from laco.train.recipe import GROUPS, Distill, Recipe, Stage
from laco.world.labels import IGNORE, LABELS

# Most patches show nothing; counted fully they drown the few that do.
_BACKGROUND = 0.1

_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|image_newline|connector|mlp1|visual\.merger|visual\.deepstack_merger_list)(\.|$)"
)
_ENCODER = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
_LAYER = re.compile(r"\.(?:layers|blocks|layer)\.(\d+)\.")


def group_of(name: str, merge_layer: int | None) -> str:
    """The group of `GROUPS` to which a parameter belongs, by its name.

    Args:
        name: as in `model.named_parameters()`.
        merge_layer: the first layer count k after which tokens are merged; None without a compressor inside.
    """
    if ".compressor." in name:
        return "compressor"
    if _PROJECTOR.search(name):
        return "projector"
    if not _ENCODER.search(name):
        return "language_model"
    layer = _LAYER.search(name)
    after = merge_layer is not None and (
        int(layer[1]) >= merge_layer if layer else "post_layernorm" in name or "head." in name
    )
    return "encoder_after" if after else "encoder_before"


def merge_layer_of(model: PreTrainedModel) -> int | None:
    """The layer count k of the first compressor in the model's vision encoder; None in an uncompressed model."""
    entries = getattr(getattr(model.config, "vision_config", None), "compression", None) or []
    return min((entry["layer"] for entry in entries), default=None)


def grouped(model: PreTrainedModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(group, name, parameter) of every parameter."""
    layer = merge_layer_of(model)
    for name, parameter in model.named_parameters():
        yield group_of(name, layer), name, parameter


class DenseHeads(nn.Module):
    """One linear map from every visual token to the classes of all dense labels; dropped after pretraining."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, sum(LABELS.values()))

    def forward(self, hidden_BNC: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Sum over labels of the mean cross-entropy; labels {name: (B, H, W)}, N = H * W, -100 where meaningless."""
        logits = self.classify(self.norm(hidden_BNC)).float().split(list(LABELS.values()), dim=-1)
        loss = hidden_BNC.new_zeros((), dtype=torch.float32)
        for (name, classes), logits_BNK in zip(LABELS.items(), logits, strict=True):
            weight = torch.ones(classes, device=logits_BNK.device)
            if name == "what":
                weight[0] = _BACKGROUND
            target = labels[name].flatten()
            if bool((target != IGNORE).any()):
                loss = loss + F.cross_entropy(logits_BNK.flatten(0, 1), target, weight, ignore_index=IGNORE)
        return loss


def answer_logits(vlm: PreTrainedModel, inputs: dict[str, Any], labels_BL: Tensor) -> Tensor:
    """Logits (tokens, vocabulary) of the answers' tokens only; most of a sequence is pictures and questions."""
    with within(ANSWERS, labels_BL):
        hidden_BLC = vlm.base_model(**inputs, use_cache=False).last_hidden_state
    head: nn.Module = vlm.get_output_embeddings()
    return head(hidden_BLC[:, :-1][labels_BL[:, 1:] != IGNORE])


class Learner(nn.Module):
    """A VLM with what only training needs: the dense heads and the split of the loss into its parts."""

    def __init__(self, vlm: PreTrainedModel, stage: Stage, dense: DenseHeads | None = None):
        super().__init__()
        self.vlm, self.stage = vlm, stage
        self.dense = dense if stage.dense else None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Every tensor once: the Trainer's checkpoints refuse embeddings that are the head's weights too."""
        state = super().state_dict(*args, **kwargs)
        names: dict[Any, str] = {}
        for name, tensor in state.items():
            names.setdefault((tensor.data_ptr(), tensor.shape) if tensor.numel() else name, name)
        return {name: state[name] for name in names.values()}

    def forward(
        self, dense_labels: dict[str, Tensor] | None = None, boxes: Sequence[Any] | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """Returns `loss`, its parts, and `answer_logits` (tokens, vocabulary) where an answer is predicted."""
        out: dict[str, Tensor] = {}
        loss = torch.zeros((), device=self.vlm.device)
        seen: dict[str, Tensor] = {}
        lesson = Lesson(boxes, self.vlm.get_output_embeddings()) if self.stage.method_loss else None
        with within(LESSON, lesson), ExitStack() as stack:
            if self.dense is not None and dense_labels is not None:
                vlm: Any = self.vlm
                seen = {"pixel_values": inputs.pop("pixel_values")}
                features = encode_pictures(vlm, seen)
                out["dense"] = self.dense(features["image"].hidden_states[-1], dense_labels)
                loss = loss + self.stage.dense * out["dense"]
            if "input_ids" in inputs:
                labels = inputs.pop("labels")
                given = stack.enter_context(given_features(self.vlm, seen, inputs, features)) if seen else inputs
                out["answer_logits"] = answer_logits(self.vlm, given, labels)
                out["answer"] = F.cross_entropy(out["answer_logits"].float(), labels[:, 1:][labels[:, 1:] != IGNORE])
                loss = loss + out["answer"]
        if lesson is not None:
            for name, losses in lesson.losses.items():
                out[name] = torch.stack(losses).mean()
                loss = loss + self.stage.method_loss * out[name]
            if not loss.requires_grad:  # nothing in this batch, such as a right answer, teaches what learns
                loss = loss + 0 * sum(p.sum() for p in self.vlm.parameters() if p.requires_grad)
        return {"loss": loss, **out}


@contextmanager
def features_of(vlm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """(B, N, C) what the vision encoder puts out in every call while this lasts."""
    found: list[Tensor] = []
    hook = family_of(vlm).encoder(vlm).register_forward_hook(lambda _, __, out: found.append(out[0]))
    try:
        yield found
    finally:
        hook.remove()


def feature_loss(mine_BNC: Tensor, theirs_BNC: Tensor) -> Tensor:
    """Divergence of tokens from the teacher's, over channels, mean over those that are there, not rows of NaN."""
    if mine_BNC.shape != theirs_BNC.shape:
        raise LacoError(
            f"distill.features compares token by token, but the teacher's encoder puts out {theirs_BNC.shape[-2]} of a"
            f" picture, the model's {mine_BNC.shape[-2]}; leave it out where tokens are merged to a smaller grid"
        )
    there_BN = ~mine_BNC[..., 0].isnan()
    return distillation(mine_BNC[there_BN].float(), theirs_BNC[there_BN].float())


class LacoTrainer(Trainer):
    """Trainer of a `Learner`: a learning rate for every group, and distillation from the uncompressed model."""

    model: Learner

    def __init__(self, *args: Any, teacher: PreTrainedModel | None, distill: Distill | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if teacher is not None:
            nn.Module.to(teacher, self.args.device)
        self.teacher, self.distill = teacher, distill
        self._parts: dict[str, list[Tensor]] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        pictures: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(pictures)  # they come in a random order already

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            stage = self.model.stage
            rates, decay = stage.rates, stage.weight_decay
            sets: dict[tuple[float, float], list[nn.Parameter]] = {}
            named = [(rates.get(group, 0.0), p) for group, _, p in grouped(self.model.vlm)]
            if self.model.dense is not None:
                named += [(max(rates.values()), p) for p in self.model.dense.parameters()]
            for rate, parameter in named:
                if parameter.requires_grad:
                    sets.setdefault((rate, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
            groups = [{"params": ps, "lr": rate, "weight_decay": wd} for (rate, wd), ps in sets.items()]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        teacher_inputs = inputs.pop("teacher", None)
        with features_of(self.model.vlm) as mine:
            out = model(**inputs)
        loss = out["loss"]
        if self.teacher is not None and self.distill is not None:
            with torch.no_grad(), features_of(self.teacher) as theirs:
                said = answer_logits(self.teacher, teacher_inputs, teacher_inputs.pop("labels"))
            t = self.distill.temperature
            out["distill"] = F.kl_div(
                F.log_softmax(out["answer_logits"].float() / t, dim=-1),
                F.log_softmax(said.float() / t, dim=-1),
                log_target=True,
                reduction="batchmean",
            ) * (t * t)
            loss = loss + self.distill.weight * out["distill"]
            if self.distill.features:
                out["features"] = feature_loss(mine[-1], theirs[-1])
                loss = loss + self.distill.features * out["features"]
        for name in out.keys() - {"loss", "answer_logits"}:
            self._parts.setdefault(name, []).append(out[name].detach())
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: round(torch.stack(parts).mean().item(), 4) for name, parts in self._parts.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def check_lessons(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises `LacoError` where a stage weighs losses of methods that the model's have not, or that this data cannot
    give; or dense labels where the encoder does not see a picture as one grid.
    """
    if any(stage.dense for stage in recipe.stages) and family_of(model).name != "llava":
        raise LacoError(
            "dense labels are of every patch of a picture that the encoder sees as a whole, as in llava; the encoder"
            f" of {family_of(model).name} sees tiles or frames"
        )
    methods = family_of(model).methods(model.config)
    taught = [method for method in methods if isinstance(method, Taught) and method.trained]
    for stage in recipe.stages:
        if not stage.method_loss:
            continue
        if not taught:
            raise LacoError(f"stage {stage.name} has method_loss, but no method in the model has a loss of its own")
        for method in taught:
            if method.learns_from == "boxes" and recipe.data.source != "world":
                raise LacoError(
                    f"stage {stage.name} has method_loss, but {method.name} learns from boxes around what a question is"
                    " about, which data.source: world alone has"
                )


def freeze(model: PreTrainedModel, stage: Stage) -> None:
    """Lets only the groups with a positive rate learn.

    Raises:
        LacoError: the stage names a group of which the model has no parameter, or nothing learns.
    """
    rates, counts = stage.rates, dict.fromkeys(GROUPS, 0)
    for group, _, parameter in grouped(model):
        parameter.requires_grad_(rates.get(group, 0.0) > 0)
        counts[group] += parameter.numel()
    named = stage.lr if isinstance(stage.lr, dict) else {}
    for group in named:
        if not counts[group]:
            raise LacoError(f"stage {stage.name} trains {group}, but the model has no parameter in that group")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise LacoError(f"nothing learns in stage {stage.name}; give one of the groups a rate above 0")
