"""The experts' load: numbers computed by hand, evaluation left out, the heatmap, and Trainer's line."""

import math
import sys
import types

import pytest
import torch

import accel_moe
from accel_moe.experts.state import swapped_layers
from accel_moe.monitoring import heatmap
from accel_moe.monitoring.statistics import LayerLoad, layer_labels, metrics_of
from tests.tiny import batches, tiny_model

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def warnings_start_anew():
    heatmap.warn_once.cache_clear()


def test_the_numbers_of_a_layer_are_those_computed_by_hand():
    load = LayerLoad.of(torch.tensor([6, 1, 1, 0]))  # 8 slots: shares 3/4, 1/8, 1/8, 0; the mean is 2
    by_hand = (0.75 * math.log(4 / 3) + 2 * 0.125 * math.log(8)) / math.log(4)
    assert (load.busiest_share, load.max_violation, load.dead_experts) == (0.75, 6 / 2 - 1, 1)
    assert load.entropy == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    "counts, expected",
    [
        pytest.param([5] * 8, LayerLoad(1 / 8, 0.0, 1.0, 0), id="even"),
        pytest.param([0, 0, 40, 0, 0, 0, 0, 0], LayerLoad(1.0, 7.0, 0.0, 7), id="one expert has all"),
        pytest.param([9, 9, 0, 0], LayerLoad(0.5, 1.0, 0.5, 2), id="half of the experts are dead"),
        pytest.param([3], LayerLoad(1.0, 0.0, 1.0, 0), id="a single expert"),
        pytest.param([2**40, 2**40], LayerLoad(0.5, 0.0, 1.0, 0), id="counts beyond 32 bits"),
    ],
)
def test_even_one_sided_and_half_dead_loads(counts, expected):
    found = LayerLoad.of(torch.tensor(counts))
    assert found.entropy == pytest.approx(expected.entropy, abs=1e-12)
    assert found == LayerLoad(expected.busiest_share, expected.max_violation, found.entropy, expected.dead_experts)


def test_metrics_are_flat_with_means_and_the_worst_over_layers():
    metrics = metrics_of({FIRST: torch.tensor([4, 4]), SECOND: torch.tensor([8, 0])})
    assert metrics == {
        "expert_load/busiest_share": 0.75,
        "expert_load/max_violation": 0.5,
        "expert_load/entropy": 0.5,
        "expert_load/dead_experts": 0.5,
        "expert_load/worst_max_violation": 1.0,
        "expert_load/layer_00/busiest_share": 0.5,
        "expert_load/layer_00/max_violation": 0.0,
        "expert_load/layer_00/entropy": 1.0,
        "expert_load/layer_00/dead_experts": 0.0,
        "expert_load/layer_01/busiest_share": 1.0,
        "expert_load/layer_01/max_violation": 1.0,
        "expert_load/layer_01/entropy": 0.0,
        "expert_load/layer_01/dead_experts": 1.0,
    }
    assert all(type(value) is float for value in metrics.values())  # tensorboard drops what is no number


def test_a_layer_without_a_slot_has_no_numbers():
    metrics = metrics_of({FIRST: torch.tensor([4, 4]), SECOND: torch.tensor([0, 0])})
    assert metrics["expert_load/max_violation"] == 0.0 and not [name for name in metrics if "layer_01" in name]
    assert metrics_of({FIRST: torch.tensor([0, 0])}) == {}


def test_layers_are_named_by_the_models_own_numbers_where_these_are_unique():
    assert list(layer_labels({"model.layers.3.mlp.experts": 0, "model.layers.11.mlp.experts": 0}).values()) == [
        "layer_03",
        "layer_11",
    ]
    assert list(layer_labels({"m.layers.120.experts": 0, "m.layers.7.experts": 0}).values()) == [
        "layer_120",
        "layer_007",
    ]
    twice = {"encoder.layers.0.experts": 0, "decoder.layers.0.experts": 0}
    assert list(layer_labels(twice).values()) == ["layer_00", "layer_01"]


def evaluate(model):
    model.eval()
    with torch.no_grad():
        model(input_ids=batches(2)[1])
    model.train()


def test_evaluation_is_left_out_whenever_it_comes():
    batch = batches(1)[0]
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm").train()
    model(input_ids=batch)
    expected = accel_moe.expert_load_metrics(model)
    assert len(expected) == 5 + 4 * 2
    evaluate(model)
    model(input_ids=batch)
    evaluate(model)
    assert accel_moe.expert_load_metrics(model) == expected
    evaluate(model)
    assert accel_moe.expert_load_metrics(model) == {}


def test_tokens_per_expert_still_counts_evaluation_and_takes_the_same_counts():
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm").train()
    batch = batches(1)[0]
    model(input_ids=batch)
    evaluate(model)
    assert all(counts.sum() == 2 * batch.numel() * 2 for counts in accel_moe.tokens_per_expert(model).values())
    assert accel_moe.expert_load_metrics(model) == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_without_gradients_and_frozen_experts_in_eval_mode_are_training(reentrant):
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm").train()
    batch = batches(1)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=batch, labels=batch).loss.backward()
    history = accel_moe.ExpertLoadHistory()
    history.measure(model, 1)
    model.gradient_checkpointing_disable()
    for _, layer in swapped_layers(model):
        layer.eval().requires_grad_(False)
    model(input_ids=batch, labels=batch).loss.backward()
    history.measure(model, 2)
    assert all(row[name].sum() == 2 * batch.numel() for row in history._rows for name in (FIRST, SECOND))


def test_an_unprepared_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"expert_load_metrics\(\) got a model .* has not seen"):
        accel_moe.expert_load_metrics(tiny_model())


# --- the heatmap ----------------------------------------------------------------------------------------------------


def history_of(times: int) -> "accel_moe.ExpertLoadHistory":
    """Two layers of 8 experts. Expert `time` has all of the first layer; in the second, expert 3 dies at time 2."""
    history = accel_moe.ExpertLoadHistory()
    for time in range(times):
        first, second = torch.zeros(8, dtype=torch.long), torch.full((8,), 7)
        first[time % 8] = 16
        second[3] = 7 if time < 2 else 0
        history.add({FIRST: first, SECOND: second}, step=10 * (time + 1))
    return history


def test_the_image_is_layer_by_layer_with_time_downwards():
    image = history_of(5).image()
    assert image.shape == (2 * 5, 8)
    assert torch.equal(image[:5], 8 * torch.eye(8, dtype=torch.double)[:5])  # over a mean of 2 slots
    assert torch.equal(image[5:7], torch.ones(2, 8, dtype=torch.double))
    assert torch.allclose(image[7:, :3], torch.tensor(8 / 7, dtype=torch.double)) and not image[7:, 3].any()


def test_layers_of_different_widths_are_padded_with_nothing():
    history = accel_moe.ExpertLoadHistory()
    history.add({FIRST: torch.tensor([1, 1, 1, 1]), SECOND: torch.tensor([1, 3])}, step=1)
    assert history.image()[1].isnan().tolist() == [False, False, True, True]


def test_the_written_file_shows_each_layer_expert_and_time_in_its_place(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    history = history_of(5)
    figure = history.figure()
    figure.draw_without_rendering()  # places the axes
    axes = figure.axes[0]
    assert axes.images[0].get_extent() == [-0.5, 7.5, 2, 0]  # 8 experts wide, 2 layers high
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["00", "01"]
    assert history.write(tmp_path / "new" / "expert_load.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["expert_load.png"]
    pixels = image.imread(tmp_path / "new" / "expert_load.png")[..., :3]

    def kind(layer: int, time: int, expert: int) -> str:
        x, y = axes.transData.transform((expert, layer + (time + 0.5) / 5))
        red, green, blue = pixels[len(pixels) - 1 - int(y), int(x)].tolist()
        return "none" if red + green + blue == 0 else "much" if red > 2 * max(green, blue) else "fair"

    for time in range(5):
        assert [kind(0, time, e) for e in range(8)] == ["much" if e == time else "none" for e in range(8)]
        expected = ["none" if e == 3 and time >= 2 else "fair" for e in range(8)]
        assert [kind(1, time, e) for e in range(8)] == expected


def test_a_long_run_keeps_a_bounded_number_of_times_and_every_slot(monkeypatch):
    monkeypatch.setattr(heatmap, "TIMES", 8)
    for times in (8, 9, 27, 64, 100):
        history = history_of(times)
        assert len(history.steps) == len(history._rows) <= 8 and history.steps[-1] == 10 * times
        assert history.steps == sorted(set(history.steps))
        assert sum(int(row[FIRST].sum()) for row in history._rows) == 16 * times


@pytest.mark.parametrize("stop", ["no matplotlib", "no folder"])
def test_a_picture_that_cannot_be_written_is_one_warning_and_no_error(stop, tmp_path, monkeypatch, caplog):
    history = history_of(2)
    if stop == "no matplotlib":
        for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)
        path, told = tmp_path / "expert_load.png", "accel_moe[monitor]"
    else:
        pytest.importorskip("matplotlib")
        (tmp_path / "file").write_text("")
        path, told = tmp_path / "file" / "expert_load.png", "Error"
    with caplog.at_level("WARNING", logger="accel_moe"):
        assert not history.write(path) and not history.write(path)
    assert not path.exists() and len(caplog.records) == 1 and told in caplog.text


def test_nothing_is_written_before_the_first_measurement(tmp_path, caplog):
    assert not accel_moe.ExpertLoadHistory().write(tmp_path / "expert_load.png")
    assert not list(tmp_path.iterdir()) and not caplog.records


def test_the_heatmap_goes_to_accelerates_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    assert history_of(3).log_image(accelerator, step=30)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    (image,) = events.Images("expert_load")
    assert image.step == 30 and image.width > image.height > 100


# --- Trainer --------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        row = batches(4)[i // 8][i % 8]
        return {"input_ids": row, "labels": row}


def trained(tmp_path, callback, **more):
    from transformers import Trainer, TrainingArguments

    model = more.pop("model", None) or accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm")
    args = dict(per_device_train_batch_size=8, max_steps=4, logging_steps=2, save_strategy="no", report_to=[])
    args |= dict(use_cpu=not torch.cuda.is_available(), disable_tqdm=True, **more)
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), **args), train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback]
    )
    trainer.train()
    return trainer


def test_trainers_integrations_get_the_numbers_in_the_training_line_and_the_console_only_the_means(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = accel_moe.ExpertLoadCallback()
    trainer = trained(
        tmp_path, callback, report_to=["tensorboard"], eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("expert_load/layer_01/entropy" in line and "expert_load/dead_experts" in line for line in lines)
    others = [line for line in trainer.state.log_history if "loss" not in line]
    assert len(others) == 3 and not [name for line in others for name in line if "expert_load" in name]
    (run,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    for name in ("max_violation", "layer_01/max_violation"):
        sent = {event.step: event.value for event in events.Scalars(f"train/expert_load/{name}")}
        assert sent == pytest.approx({line["step"]: line[f"expert_load/{name}"] for line in lines}, rel=1e-6)  # float32
    assert [image.step for image in events.Images("train/expert_load")] == [2, 4]
    assert (tmp_path / "expert_load.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "expert_load/worst_max_violation" in printed and "expert_load/layer_" not in printed


def test_training_goes_on_without_matplotlib_with_one_warning(tmp_path, monkeypatch, caplog):
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("WARNING", logger="accel_moe"):
        trainer = trained(tmp_path, accel_moe.ExpertLoadCallback(), eval_strategy="steps", eval_steps=2)
    assert trainer.state.global_step == 4 and not (tmp_path / "expert_load.png").exists()
    assert len([record for record in caplog.records if "accel_moe[monitor]" in record.message]) == 1


def test_wandb_gets_the_picture_and_its_failure_ends_no_training(tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    from transformers.integrations import WandbCallback

    class Integration(WandbCallback):
        """Without the package."""

        def __init__(self):
            self._wandb = None

        def on_log(self, *args, **kwargs):
            """Sends no line."""

        on_save = on_log

    sent = []
    wandb = types.SimpleNamespace(run=object(), log=sent.append, Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    callback = accel_moe.ExpertLoadCallback()
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm")
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Integration])
    trained(tmp_path, callback, model=model)
    picture = ("image", str(tmp_path / "expert_load.png"))
    assert sent == [{"train/expert_load_heatmap": picture, "train/global_step": 4}]
    wandb.log = None
    with caplog.at_level("WARNING", logger="accel_moe"):
        trained(tmp_path, callback, model=model)
    assert "No tracker got the heatmap" in caplog.text


def test_the_heatmap_can_be_turned_off_and_an_unprepared_model_is_refused(tmp_path):
    trainer = trained(tmp_path, accel_moe.ExpertLoadCallback(heatmap=False))
    assert "expert_load/entropy" in trainer.state.log_history[0] and not list(tmp_path.glob("*.png"))
    with pytest.raises(ValueError, match="ExpertLoadCallback got a model"):
        trained(tmp_path, accel_moe.ExpertLoadCallback(), model=tiny_model())


def test_a_resumed_run_leaves_the_first_ones_picture_alone(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = trained(tmp_path, accel_moe.ExpertLoadCallback(), save_strategy="steps", save_steps=2)
    before = (tmp_path / "expert_load.png").read_bytes()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "expert_load.png").read_bytes() == before
    assert (tmp_path / "expert_load_from_step_2.png").exists()
