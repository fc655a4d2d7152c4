"""The lpips package itself, as an independent answer."""

import lpips

from latent_ae.pretrained.lpips import LPIPS


def lpips_package(ours: LPIPS) -> lpips.LPIPS:
    """The package with the trunk of ours: its own would come from a hub."""
    package = lpips.LPIPS(net=ours.net, pnet_rand=True, verbose=False).eval().requires_grad_(False)
    trunk = {name.replace(".", "_"): tensor for name, tensor in ours.named_buffers()}
    for name, parameter in package.net.named_parameters():
        _, position, kind = name.rsplit(".", 2)
        parameter.data.copy_(trunk[f"conv{position}_{kind}"])
    return package
