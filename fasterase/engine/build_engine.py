"""Which engine a run gets."""

from __future__ import annotations

from fasterase.config import UnlearnConfig
from fasterase.engine.optim import Trained, build_optimizer
from fasterase.models.dual_encoder import DualEncoder, separate_copy
from fasterase.models.forward import TowerForward
from fasterase.parallel.engine import Engine
from fasterase.parallel.local import LocalEngine
from fasterase.parallel.ranks import Ranks
from fasterase.parallel.replicated import ReplicatedEngine
from fasterase.parallel.zero_config import read_deepspeed, zero_stage


def shards(config: UnlearnConfig) -> bool:
    """Whether the run shards anything, so that the engine needs a model of its own."""
    return config.deepspeed is not None and zero_stage(read_deepspeed(config.deepspeed)) > 0


def working_model(model: DualEncoder, config: UnlearnConfig) -> DualEncoder:
    """Return the model that is trained: the caller's, or a copy that DeepSpeed may take apart."""
    return separate_copy(model) if shards(config) else model


def build_engine(
    working: DualEncoder,
    model: DualEncoder,
    trained: Trained,
    *,
    config: UnlearnConfig,
    precision: str,
    ranks: Ranks,
) -> Engine:
    """Return the engine over `working`, whose `requires_grad` and modes are set for training.

    Args:
        working: what `working_model` returned for `model`.
        model: the caller's model, on which `Engine.export` leaves the result.
        trained: the trained parameters.
        config: the run's settings.
        precision: compute dtype of the towers, resolved.
        ranks: who takes part.

    Raises:
        InputError: DeepSpeed's configuration contradicts the run's.
    """
    forward = TowerForward(
        working, precision=precision, image_trained=trained.image, text_trained=trained.text
    )
    parameters = trained.parameters(working.module)
    optimizer = build_optimizer(
        working.module,
        trained,
        name=config.optimizer,
        lr=0.0,  # the pacing sets it at each step
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if working is not model:
        from fasterase.parallel.zero import ZeroEngine
        from fasterase.parallel.zero_config import complete

        assert config.deepspeed is not None
        given = read_deepspeed(config.deepspeed)
        complete_config = complete(given, config, precision=precision, world_size=ranks.world_size)
        return ZeroEngine(
            forward, parameters, optimizer, config=complete_config, model=model, ranks=ranks
        )
    kind = LocalEngine if ranks.world_size == 1 else ReplicatedEngine
    return kind(
        forward,
        parameters,
        optimizer,
        precision=precision,
        moves_buffers=config.train_mode,
        ranks=ranks,
    )
