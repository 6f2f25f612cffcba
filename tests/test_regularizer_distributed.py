"""OrthoRegularizer with real processes: DDP = FSDP2 = one process, in float64.

The shares of the ranks: test_regularizer_work_group.py. Here 2 and 3 processes start once each, and every check
is a test of its own.
"""

import itertools
from functools import partial
from unittest import mock

import pytest

from isonet_fast.geometry import Layer
from isonet_fast.problem import read

from .processes import outcomes
from .ranks import (
    after_backward,
    before_backward,
    between,
    loss_plus_reg,
    network,
    reg_plus_loss,
)
from .ranks_ddp import (
    ddp_accumulation,
    ddp_frozen,
    ddp_more_ranks_than_units,
    ddp_steps,
    ddp_wrong_order,
    ddp_wrong_order_after_no_sync,
    last_total_before_the_first_call,
)
from .ranks_fsdp import (
    fsdp_accumulation,
    fsdp_bfloat16_masters,
    fsdp_built_after_an_evaluation,
    fsdp_collectives,
    fsdp_comes_first,
    fsdp_everything_frozen,
    fsdp_frozen,
    fsdp_interval,
    fsdp_layer_replaced,
    fsdp_mixed_precision,
    fsdp_more_ranks_than_units,
    fsdp_optimizer_in_the_backward,
    fsdp_scaled_gradients,
    fsdp_steps,
    fsdp_summary,
    fsdp_weights_exchanged,
    made_before_fully_shard,
    sharded_otherwise,
    work_group_of_other_ranks,
)
from .regularized import forms_of_3x3


def named(check, **options):
    """Every combination of the options' values: {name: check}."""
    out = {}
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        label = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in chosen.items())
        out[f"{check.__name__}({label})"] = partial(check, **chosen)
    return out


def by_frequency(steps_of, **options):
    """Ranks share (layer, frequency) units of some layers and (layer, offset) units of the others."""
    with mock.patch.object(Layer, "form", property(lambda layer: "overlap" if layer.rows == 4 else "frequency")):
        read.cache_clear()
        steps_of(**options)
        read.cache_clear()


BOTH, DDP_FORMS = [False, True], [loss_plus_reg, reg_plus_loss, before_backward, between]


ONE_OF_EACH = [loss_plus_reg, before_backward]


FSDP_FORMS = [*DDP_FORMS, after_backward]


CHECKS = {
    **named(ddp_steps, form=DDP_FORMS, gradient_as_bucket_view=BOTH),
    **named(ddp_steps, form=ONE_OF_EACH, gradient_as_bucket_view=BOTH, static_graph=[True]),
    **named(ddp_accumulation, form=DDP_FORMS, gradient_as_bucket_view=BOTH),
    **named(ddp_accumulation, form=ONE_OF_EACH, gradient_as_bucket_view=[True], static_graph=[True]),
    **named(ddp_frozen, form=ONE_OF_EACH),
    **named(ddp_more_ranks_than_units, form=ONE_OF_EACH),
    **named(ddp_wrong_order, set_to_none=BOTH, gradient_as_bucket_view=BOTH),
    **named(ddp_wrong_order, set_to_none=BOTH, gradient_as_bucket_view=[True], static_graph=[True]),
    **named(ddp_wrong_order_after_no_sync),
    **named(last_total_before_the_first_call),
    **named(fsdp_steps, form=FSDP_FORMS, split=[True], each=BOTH),
    **named(fsdp_steps, form=FSDP_FORMS, split=[False], each=[True]),
    **named(fsdp_accumulation, form=FSDP_FORMS),
    **named(fsdp_frozen, form=FSDP_FORMS),
    **named(fsdp_more_ranks_than_units, form=ONE_OF_EACH),
    **named(by_frequency, steps_of=[ddp_steps], form=ONE_OF_EACH),
    **named(by_frequency, steps_of=[fsdp_steps], form=ONE_OF_EACH, split=[True], each=[True]),
    **named(fsdp_everything_frozen),
    **named(fsdp_scaled_gradients, split=BOTH),
    **named(fsdp_mixed_precision, form=FSDP_FORMS, each=BOTH),
    **named(fsdp_bfloat16_masters, split=BOTH),
    **named(fsdp_collectives, form=["autograd", "accumulate_grad_"], split=BOTH),
    **named(fsdp_comes_first, form=[loss_plus_reg, reg_plus_loss]),
    **named(fsdp_weights_exchanged),
    **named(fsdp_built_after_an_evaluation),
    **named(fsdp_interval),
    **named(fsdp_summary),
    **named(fsdp_layer_replaced),
    **named(fsdp_optimizer_in_the_backward),
    **named(sharded_otherwise),
    **named(made_before_fully_shard),
    **named(work_group_of_other_ranks),
}


def test_the_network_has_layers_over_offsets_and_over_frequencies():
    assert forms_of_3x3(network()) == {"overlap", "frequency"}


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def outcome(request, tmp_path_factory):
    return outcomes(CHECKS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_with_real_processes(outcome, name):
    assert not outcome[name], outcome[name]
