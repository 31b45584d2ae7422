"""Learning-rate schedules and optimizers, as optax transformations built from one knob group.

Every optimizer is the same chain, read from the gradient to the update:

    L1 and L2 penalties -> clip the global norm -> the optimizer's rule -> decoupled weight decay
    -> times the learning rate -> weight average -> skip what is not finite

Weight decay is multiplied by the learning rate, as in optax.adamw and PyTorch:
`p -= lr * (direction + weight_decay * p)`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bigjax import run
from bigjax.transforms import (
    DECAY_RULES,
    MUON_RULES,
    AverageState,
    add_penalties,
    average_weights,
    decay_mask,
    scale_by_muon,
)

OPTIMIZERS = ('sgd', 'rmsprop', 'adam', 'adamw', 'adafactor', 'lion', 'muon')
SCHEDULES = ('constant', 'step', 'warmup_cosine', 'warmup_linear', 'rsqrt', 'wsd')
NONFINITE = ('stop', 'skip')

Schedule = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Optim:
    """How parameters are updated.

    Attributes:
        optimizer: sgd, rmsprop, adam, adamw, adafactor, lion, muon (matrices; AdamW for the rest)
        schedule: constant, step, warmup_cosine, warmup_linear, rsqrt, wsd (warm-up, stable, decay)
        peak_lr: highest learning rate (for adafactor: relative to each parameter's RMS)
        warmup: steps of linear warm-up, whatever the schedule; 0 = none
        end_lr: last learning rate as a fraction of the peak (warmup_cosine, warmup_linear, wsd)
        decay: fraction of all steps that wsd spends in its final linear decay
        decay_every: steps, from the end of warm-up, between two decays of the step schedule
        decay_factor: by what the step schedule multiplies the rate at each decay
        weight_decay: decoupled decay, multiplied by the learning rate; not on biases and norms
        b1: decay of the first moment (adam, adamw, lion, muon's AdamW)
        b2: decay of the second moment (rmsprop, adam, adamw, lion, muon's AdamW)
        eps: term added to the denominator (adam, adamw, muon's AdamW); rmsprop's is in the root
        momentum: momentum of sgd and rmsprop (heavy ball), of muon (Nesterov; 0.95 is usual there)
        l1: L1 penalty: sign(p) * l1 joins the gradient, where weight decay applies
        l2: L2 penalty: p * l2 joins the gradient, where weight decay applies
        clip: largest global norm of the gradient, penalties included; 0 = off
        ema: decay of the weight average that is evaluated instead of the weights; 0 = off
        nonfinite: stop the run at a gradient that is not finite, or skip that update
    """

    optimizer: str = 'adamw'
    schedule: str = 'warmup_cosine'
    peak_lr: float = 1e-3
    warmup: int = 100
    end_lr: float = 0.1
    decay: float = 0.2
    decay_every: int = 0
    decay_factor: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.9
    l1: float = 0.0
    l2: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    nonfinite: str = 'stop'


def check(optim: Optim, *, steps: int) -> None:
    """Raises UsageError, naming flag, value, rule and a value that works, before a compilation."""

    def need(holds: bool, flag: str, rule: str, works: object) -> None:
        run.need(holds, optim, flag, f'must be {rule}', works)

    need(optim.optimizer in OPTIMIZERS, 'optimizer', f'one of {", ".join(OPTIMIZERS)}', 'adamw')
    need(optim.schedule in SCHEDULES, 'schedule', f'one of {", ".join(SCHEDULES)}', 'warmup_cosine')
    need(optim.nonfinite in NONFINITE, 'nonfinite', f'one of {", ".join(NONFINITE)}', 'stop')
    need(0 < optim.peak_lr < math.inf, 'peak_lr', 'positive and finite', '1e-3')
    need(optim.warmup >= 0, 'warmup', 'at least 0', 0)
    need(optim.warmup < steps, 'warmup', f'smaller than --steps={steps}', steps // 10)
    need(0 <= optim.end_lr <= 1, 'end_lr', 'between 0 and 1 (a fraction of the peak)', 0.1)
    need(0 < optim.decay <= 1, 'decay', 'above 0 and at most 1 (a fraction of --steps)', 0.2)
    if optim.schedule == 'wsd':
        room = 1 - optim.warmup / steps
        rule = f'at most {room:.4g}, what --warmup={optim.warmup} leaves of --steps={steps}'
        need(optim.decay <= room + 1e-9, 'decay', rule, f'{room / 2:.2g}')
    if optim.schedule == 'step':
        rule = 'at least 1 with --schedule=step'
        need(optim.decay_every >= 1, 'decay_every', rule, max(steps // 3, 1))
        rule = 'above 0 and at most 1 with --schedule=step'
        need(0 < optim.decay_factor <= 1, 'decay_factor', rule, 0.1)
    for flag, fix in (('b1', 0.9), ('b2', 0.99), ('momentum', 0.9), ('ema', 0.999)):
        need(0 <= getattr(optim, flag) < 1, flag, 'at least 0 and below 1', fix)
    need(0 < optim.eps < math.inf, 'eps', 'positive and finite', '1e-8')
    for flag in ('weight_decay', 'l1', 'l2', 'clip'):
        need(0 <= getattr(optim, flag) < math.inf, flag, 'at least 0 and finite', 0)
    if optim.optimizer == 'adam':
        rule = '0 with --optimizer=adam, which has none (--optimizer=adamw has, --l2 is a penalty)'
        need(optim.weight_decay == 0, 'weight_decay', rule, 0)


def make_schedule(optim: Optim, steps: int) -> Schedule:
    """Learning rate of the update that follows n earlier ones, for n in 0 .. steps - 1.

    With w = warmup, the rate is peak (n+1)/(w+1) below w and peak at n = w: no update is empty.
    warmup_cosine, warmup_linear and wsd would reach end_lr * peak at n = steps, one past the last.
    step is peak decay_factor^floor((n-w)/decay_every), a staircase counted from the end of warm-up,
    as torchvision (SequentialLR of a warm-up and StepLR) and optax.join_schedules count. rsqrt is
    peak sqrt((w+1)/(n+1)) (Vaswani et al. 2017, eq. 3, scaled to the peak). wsd stays at the peak
    until the last `decay` of all steps and falls linearly there (Hu et al. 2024, §4).

    Args:
        optim: the knobs.
        steps: updates in the whole run.

    Returns:
        A function of n (int or integer array, any shape) giving float32 of that shape.

    Raises:
        UsageError: for a value outside its range.
    """
    check(optim, steps=steps)
    peak, end, ramp = optim.peak_lr, optim.end_lr, optim.warmup + 1
    start = optim.warmup if optim.schedule != 'wsd' else steps - optim.decay * steps

    def schedule(n):
        past = jnp.maximum(jnp.asarray(n, jnp.int32) - optim.warmup, 0)
        n = jnp.asarray(n, jnp.float32)
        done = jnp.clip((n - start) / (steps - start), 0, 1)
        match optim.schedule:
            case 'warmup_cosine':
                factor = end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
            case 'warmup_linear' | 'wsd':
                factor = 1 - (1 - end) * done
            case 'step':
                # In integers: a compiled quotient of floats may fall short of a whole number.
                factor = optim.decay_factor ** (past // optim.decay_every).astype(jnp.float32)
            case 'rsqrt':
                factor = jnp.sqrt(ramp / jnp.maximum(n + 1, ramp))
            case _:
                factor = jnp.ones_like(n)
        return peak * factor * jnp.minimum((n + 1) / ramp, 1)

    return schedule


def evaluation_params(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """The parameters to evaluate, generate and export with: the average if there is one.

    It lies where `params` lie then, also where the state of the optimizer is in the host's memory.
    """
    is_average = lambda x: isinstance(x, AverageState)  # noqa: E731
    for node in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(node):
            return jax.device_put(node.average, jax.tree.map(lambda x: x.sharding, params))
    return params


def _direction(optim: Optim, muon_rules: tuple) -> optax.GradientTransformation:
    """The optimizer's own rule: from gradient to direction, before decay and learning rate."""
    match optim.optimizer:
        case 'sgd':
            return optax.trace(optim.momentum) if optim.momentum else optax.identity()
        case 'rmsprop':
            # As in TensorFlow: v starts at 1, eps is in the root, nothing is corrected.
            rms = optax.scale_by_rms(optim.b2, optim.eps, 1.0, eps_in_sqrt=True)
            return optax.chain(rms, optax.trace(optim.momentum)) if optim.momentum else rms
        case 'adam' | 'adamw':
            return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
        case 'lion':
            return optax.scale_by_lion(optim.b1, optim.b2)
        case 'adafactor':  # optax.adafactor up to its learning rate
            return optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
        case 'muon':
            adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps)
            return scale_by_muon(optim.momentum, rest=adam, rules=muon_rules)
    raise AssertionError(optim.optimizer)


def make_optimizer(
    optim: Optim,
    *,
    steps: int,
    decay_rules: tuple = DECAY_RULES,
    muon_rules: tuple = MUON_RULES,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The whole optimizer and its learning-rate schedule.

    The state's leaves that belong to a parameter end in that parameter's path and have its shape,
    except Adafactor's factored moments. With nonfinite='skip' an update whose gradient is not
    finite leaves parameters and state (schedule and average included) as they were.

    rmsprop is TensorFlow's: v = b2 v + (1-b2) g² starts at 1 and the direction is g / sqrt(v +
    eps). Its momentum sums directions before they meet the learning rate, as sgd's does and as in
    PyTorch; TensorFlow sums after, which differs for some 1 / (1 - momentum) steps when the rate
    changes.

    Args:
        optim: the knobs.
        steps: updates in the whole run.
        decay_rules: ordered (regex, bool) over parameter paths, for weight decay, L1 and L2.
        muon_rules: ordered (regex, roles of the dimensions), see MUON_RULES.

    Raises:
        UsageError: for a knob outside its range; from init, for a parameter no decay rule covers.
    """
    schedule = make_schedule(optim, steps)
    mask = lambda params: decay_mask(params, decay_rules)  # noqa: E731
    links = []
    if optim.l1 or optim.l2:
        links.append(add_penalties(optim.l1, optim.l2, mask))
    if optim.clip:
        links.append(optax.clip_by_global_norm(optim.clip))
    links.append(_direction(optim, muon_rules))
    if optim.weight_decay:
        links.append(optax.add_decayed_weights(optim.weight_decay, mask))
    links.append(optax.scale_by_learning_rate(schedule))
    optimizer = optax.chain(*links)
    if optim.ema:
        optimizer = average_weights(optimizer, optim.ema)
    if optim.nonfinite == 'skip':
        # The largest int32: apply_if_finite would let NaN through after that many in a row.
        optimizer = optax.apply_if_finite(optimizer, 2**31 - 1)
    return optimizer, schedule
