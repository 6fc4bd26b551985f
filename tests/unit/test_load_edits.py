"""What users do to a model between from_pretrained and accelerator.prepare: kept as plain from_pretrained keeps it, or
refused by the tensor's name. Never lost without a word."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import accel_moe
from accel_moe.weights import fill, plan
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("many_ranks")
NAME = r"(lm_head|model\.(embed_tokens|norm|layers\.\d))\.?\S*weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for tie in (False, True):
        found[tie] = tmp_path_factory.mktemp(f"tie_{tie}")
        tiny_model(tie=tie).save_pretrained(found[tie])
    return found


def head_of(values):
    def edit(model):
        model.lm_head.weight = nn.Parameter(values)

    return edit


def new_head(model):
    torch.manual_seed(3)
    model.lm_head = nn.Linear(32, 64, bias=False)


def replaced_layer(model):
    torch.manual_seed(3)
    model.model.layers[1] = type(model.model.layers[1])(model.config, 1)
    for parameter in model.model.layers[1].parameters():
        parameter.normal_()


def dropped_first_layer(model):
    model.model.layers = model.model.layers[1:]


def dropped_last_layer(model):
    del model.model.layers[-1]


def swapped_layers(model):
    model.model.layers = nn.ModuleList([model.model.layers[1], model.model.layers[0]])


def swapped_parts(model):
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


def swapped_and_cast(model):
    swapped_layers(model)
    model.bfloat16()


def same_layer_twice(model):
    model.model.layers[1] = model.model.layers[0]


def copied_layer(model):
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def copied_weight(model):
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())


def wrapped_again(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight)


def exchanged_data(model):
    first, second = (layer.mlp.gate.weight for layer in model.model.layers)
    first.data, second.data = second.data, first.data


def assigned_data(model):
    model.lm_head.weight.data = torch.full((64, 32), 0.25)


def cast(model):
    model.to(torch.bfloat16)


def cast_there_and_back(model):
    model.bfloat16().float()


def cast_part(model):
    model.model.layers[0].mlp.gate.half()


def tied_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tied_by_transformers(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


def some_values(model):
    return {key: torch.full(value.shape, 0.02) for key, value in model.state_dict().items() if "norm" in key}


def loaded_by_assignment(model):
    model.load_state_dict(some_values(model), strict=False, assign=True)


def its_own_state_dict(model):
    model.load_state_dict(model.state_dict(), assign=True)


def flags(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)


def new_buffer(model):
    model.register_buffer("mine", torch.arange(3.0))


def changed_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def embeddings_set(model):
    torch.manual_seed(3)
    model.set_input_embeddings(nn.Embedding(64, 32))


def new_norm_beside(model):
    model.model.norm = nn.Sequential(model.model.norm, nn.LayerNorm(32))


def copied_norm(model):
    model.model.norm = copy.deepcopy(model.model.norm)


KEPT = [
    head_of(torch.full((64, 32), 0.5)),
    head_of(torch.full((80, 32), 0.5)),
    new_head,
    replaced_layer,
    dropped_first_layer,
    dropped_last_layer,
    swapped_layers,
    swapped_parts,
    swapped_and_cast,
    same_layer_twice,
    copied_layer,
    copied_weight,
    wrapped_again,
    exchanged_data,
    assigned_data,
    cast,
    cast_there_and_back,
    cast_part,
    tied_by_hand,
    tied_by_transformers,
    loaded_by_assignment,
    its_own_state_dict,
    flags,
    new_buffer,
    changed_buffer,
    embeddings_set,
    new_norm_beside,
    copied_norm,
]


def all_of(model):
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return dict(named)


@pytest.mark.core
@pytest.mark.parametrize(("tie", "prepared"), [(False, True), (True, False)], ids=["untied, prepared", "tied"])
@pytest.mark.parametrize("edit", KEPT, ids=lambda f: f.__name__)
def test_an_edit_is_kept_as_plain_from_pretrained_keeps_it(edit, tie, prepared, folders):
    plain = AutoModelForCausalLM.from_pretrained(folders[tie], dtype="float32")
    ours = accel_moe.from_pretrained(folders[tie], dtype="float32")
    assert plan.pending(ours) is not None
    if prepared:
        accel_moe.prepare(ours, moe_kernel="grouped_mm")
    with torch.no_grad():
        edit(plain)
        edit(ours)
    fill.fill(ours, torch.device("cpu"))
    expected, found = all_of(plain), all_of(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not found[name].is_meta and type(found[name]) is type(tensor), name
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].requires_grad == tensor.requires_grad, name
    ties = {(a, b) for a in expected for b in expected if expected[a] is expected[b]}
    assert ties == {(a, b) for a in found for b in found if found[a] is found[b]}


def test_buffers_of_the_files_follow_their_layers_and_casts(tmp_path):
    model = tiny_model("glm4_moe", num_hidden_layers=3)
    for at, layer in enumerate(model.model.layers[1:]):
        layer.mlp.gate.e_score_correction_bias.fill_(0.1 + at)
    model.save_pretrained(tmp_path)
    roads = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32"), accel_moe.from_pretrained(tmp_path)
    for model in roads:
        first, second, third = model.model.layers
        model.model.layers = nn.ModuleList([first, third, second])
        model.bfloat16().float()
    fill.fill(roads[1], torch.device("cpu"))
    expected, found = map(all_of, roads)
    assert expected["model.layers.1.mlp.gate.e_score_correction_bias"][0].item() == torch.tensor(1.1).bfloat16().item()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def zeroed(model):
    model.lm_head.weight.zero_()


def zeroed_data(model):
    model.lm_head.weight.data.zero_()


def data_of_a_row(model):
    model.lm_head.weight.data[3].normal_()


@torch.inference_mode()
def zeroed_in_inference_mode(model):
    model.lm_head.weight.zero_()


@torch.no_grad()
def scaled_rows(model):
    model.model.embed_tokens.weight[2:4] *= 0.5


def initialised_again(model):
    nn.init.normal_(model.lm_head.weight, std=0.01)


def applied(model):
    model.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Linear) else None)


def loaded_by_copying(model):
    model.load_state_dict(some_values(model), strict=False)


def changed_and_cast(model):
    zeroed(model)
    model.bfloat16()


def changed_and_copied(model):
    zeroed(model)
    model.lm_head = copy.deepcopy(model.lm_head)


def computed(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)


def made_on_meta(model):
    model.lm_head = nn.Linear(32, 64, bias=False, device="meta")


def added_on_meta(model):
    model.model.layers[0].adapter_weight = nn.Parameter(torch.empty(2, device="meta"))


def cut_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data[:32]


def resized(model):
    model.resize_token_embeddings(80, mean_resizing=False)


def shrunk(model):
    model.resize_token_embeddings(48)


def one_into_another(model):
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)


LOST = [
    zeroed,
    zeroed_data,
    data_of_a_row,
    zeroed_in_inference_mode,
    scaled_rows,
    initialised_again,
    applied,
    loaded_by_copying,
    changed_and_cast,
    changed_and_copied,
    computed,
    made_on_meta,
    added_on_meta,
    cut_data,
    resized,
    shrunk,
    one_into_another,
]


@pytest.mark.core
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("edit", LOST, ids=lambda f: f.__name__)
def test_an_edit_whose_result_nobody_can_know_is_refused_by_the_tensors_name(edit, tie, folders):
    model = accel_moe.from_pretrained(folders[tie], dtype="float32")
    with pytest.raises(ValueError, match=rf"^{NAME}.* after accel_moe\.from_pretrained\(\).*Load with transformers'"):
        edit(model)
        plan.check_unchanged(model, plan.pending(model).plan)


def test_an_untouched_model_loses_its_deferred_tensors_when_it_is_filled(folders):
    model = accel_moe.from_pretrained(folders[False], dtype="float32")
    before = {name: id(p) for name, p in model.named_parameters()}
    fill.fill(model, torch.device("cpu"))
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert before == {name: id(p) for name, p in model.named_parameters()}, "an optimizer would hold others"


def test_a_dropped_layer_is_not_read(folders):
    read = {}
    for layers in (2, 1):
        model = accel_moe.from_pretrained(folders[False], dtype="float32")
        model.model.layers = model.model.layers[:layers]
        read[layers] = fill.fill(model, torch.device("cpu")).read_bytes
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert read[2] - read[1] == layer


def test_a_copy_of_the_whole_model_is_filled_like_the_model(folders):
    model = copy.deepcopy(accel_moe.from_pretrained(folders[True], dtype="float32"))
    plain = AutoModelForCausalLM.from_pretrained(folders[True], dtype="float32")
    fill.fill(model, torch.device("cpu"))
    assert all(torch.equal(tensor, all_of(plain)[name]) for name, tensor in all_of(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_optimizer_with_a_parameter_that_was_replaced_since_is_refused(folders):
    model = accel_moe.from_pretrained(folders[False], dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan.check_together([model], [optimizer])
    new_head(model)
    with pytest.raises(
        ValueError, match=r"The optimizer holds lm_head\.weight, of shape \(64, 32\).*Make the optimizer"
    ):
        plan.check_together([model], [optimizer])


def test_the_message_says_how_to_give_values(folders):
    model = accel_moe.from_pretrained(folders[False], dtype="float32")
    zeroed(model)
    with pytest.raises(ValueError, match=re.escape("load_state_dict(..., assign=True)")):
        plan.check_unchanged(model, plan.pending(model).plan)
