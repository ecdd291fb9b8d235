"""What makers publish of a GPU: peaks by precision, memory, and how fast its links are.

A peak is dense, in TFLOP/s: half of a figure "with sparsity". Products accumulate in fp32, as
training needs; on GeForce that is half of the advertised rate. fp32 is without tensor cores, tf32
what fp32 becomes where torch may use it. What nobody publishes is left out, never made up.

Sources, by maker. NVIDIA: the data sheets of T4, V100, A10, A100, L4, L40S, H100, H200 and of HGX
and DGX B200; the Blackwell brief and the GB200 NVL72's page (a superchip halved); for GeForce the
appendices of the GA102, Ada and RTX Blackwell white papers; DGX Spark's page for GB10. H800 and H20
have no public sheet of NVIDIA's: H800's peaks and memory are H100's, its NVLink 400 GB/s both ways;
H20's are those that server makers print (its 4 TB/s and 148 TFLOP/s agree everywhere). AMD: the
MI300X data sheet; 304 units x 2.1 GHz x 2048 operations of a bf16 matrix make its 1307.4.

GB10 has one published peak, 1 PFLOP/s of sparse FP4, which tells nothing of bf16: its MFU is
unknown. Of the links:

    link       GB/s one way to GPUs of the same node: NVLink or Infinity Fabric, otherwise PCIe
               (sheets give both ways together). MI300X: to all seven others at once
    network    GB/s one way of one GPU to other nodes: DGX and HGX systems have a card of 200 or
               400 Gb/s for each GPU, and so have most of MI300X; GB10 has 200 Gb/s. None where
               it is up to who builds the machine
    per_node   GPUs that one machine has. Of GB200's rack a tray has 4; NVLink joins all 72
"""

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    peaks: dict[str, float]  # precision of the products -> dense TFLOP/s
    memory: float | None = None  # GB, 1e9 bytes
    bandwidth: float | None = None  # of the memory, GB/s
    link: float | None = None  # GB/s, see above
    network: float | None = None
    per_node: int = 8


def tensor_cores(fp32: float, tf32: float, bf16: float, fp8: float | None = None) -> dict:
    """Peaks of a GPU that multiplies fp16 as fast as bf16."""
    peaks = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": bf16}
    return peaks if fp8 is None else peaks | {"fp8": fp8}


H100 = tensor_cores(67, 494.5, 989.5, 1979)  # and all others of its chip at full speed
NVL = tensor_cores(60, 417.5, 835.5, 1670.5)
H100_SXM = Device(H100, 80, 3350, 450, 50)

DEVICES = {
    "V100-SXM2": Device({"fp16": 125, "fp32": 15.7}),
    "V100-PCIE": Device({"fp16": 112, "fp32": 14}),
    "V100S-PCIE": Device({"fp16": 130, "fp32": 16.4}),
    "T4": Device({"fp16": 65, "fp32": 8.1}),
    "A10": Device(tensor_cores(31.2, 62.5, 125), 24, 600, 32),
    "A100": Device(tensor_cores(19.5, 156, 312), 80, 2039, 300, 25),
    "L4": Device(tensor_cores(30.3, 60, 121, 242.5), 24, 300, 32),
    "L40S": Device(tensor_cores(91.6, 183, 362, 733), 48, 864, 32),
    "RTX 3090": Device(tensor_cores(35.6, 35.6, 71), 24, 936, 32),
    "RTX 4090": Device(tensor_cores(82.6, 82.6, 165.2, 330.3), 24, 1008, 32),
    "RTX 5090": Device(tensor_cores(104.8, 104.8, 209.5, 419), 32, 1792, 64),
    # H100 without PCIe or NVL in its name is the SXM card.
    "H100 HBM3": H100_SXM,
    "H100 SXM5": H100_SXM,
    "H100 PCIe": Device(tensor_cores(51, 378, 756.5, 1513), 80, 2000, 64),
    "H100 NVL": Device(NVL, 94, 3900, 64),
    "H800": Device(H100, 80, 3350, 200, 50),
    # The chip of the H100 PCIe, whose memory and links are not said to be the same.
    "H800 PCIe": Device(tensor_cores(51, 378, 756.5, 1513)),
    "H20": Device(tensor_cores(44, 74, 148, 296), 96, 4000, 450, 50),
    "H200": Device(H100, 141, 4800, 450, 50),
    "H200 NVL": Device(NVL, 141, 4800, 64),
    "B200": Device(tensor_cores(75, 1100, 2250, 4500), 180, 8000, 900, 50),
    "GB200": Device(tensor_cores(80, 1250, 2500, 5000), 186, 8000, 900, 50, 4),
    "GB10": Device({}, 128, 273, None, 25, 1),
    "MI300X": Device(tensor_cores(163.4, 653.7, 1307.4, 2614.9), 192, 5300, 448, 50),
}
# Beside a listed name these words mean another chip, or a part of one.
OTHER_CHIP = {"laptop", "mig", "max", "super", "ti", "d", "grid"}
# The profile of a virtual GPU, as in A10-4Q: GB of memory, how it is licensed.
SHARE = re.compile(r"\d+[qcab]")


def find(device_name: str) -> Device | None:
    """The device that `torch.cuda.get_device_name()` calls so; None where the table has none.

    Names match by whole words and the longest match wins: "NVIDIA H100 PCIe" is not taken for the
    SXM card, "GH200" not for an H200, "L40" not for an L4. A laptop's RTX 4090, a MIG slice and a
    virtual GPU's share are unknown.
    """
    words = set(re.findall(r"\w+", device_name.lower()))
    known = [name for name in DEVICES if words.issuperset(re.findall(r"\w+", name.lower()))]
    if not known or words & OTHER_CHIP or any(map(SHARE.fullmatch, words)):
        return None
    return DEVICES[max(known, key=len)]


def short(name: str) -> str:
    return re.sub(r"\W|rtx|nvidia|amd|instinct", "", name.lower())


# What people type for a card -> its name in the table, for those whose memory is known.
TYPED = {short(name): name for name, device in DEVICES.items() if device.memory}
TYPED["h100"] = TYPED["h100sxm"] = "H100 SXM5"
# As help lists them.
NAMES = [name.replace(" ", "-") for name in TYPED.values() if not name.startswith("H100 ")]
NAMES = list(dict.fromkeys([*NAMES, "H100", "H100-PCIe", "H100-NVL"]))


def typed(text: str) -> str:
    """The name in DEVICES for what a user types: 4090, rtx-4090, H100, "RTX 4090".

    Raises ValueError, with the nearest name, for any other.
    """
    if short(text) in TYPED:
        return TYPED[short(text)]
    first_words = {short(re.split(r"\W", name)[0]) for name in DEVICES}
    if short(text) in {*map(short, DEVICES)} | first_words - {""}:
        raise ValueError(
            f"gpu {text!r} has no memory and no links in metrics/devices.py; leave --gpu out, and "
            "type --memory=16GB, or what yours has"
        )
    near = difflib.get_close_matches(short(text), TYPED, 1)
    hint = f"there are: {', '.join(NAMES)}"
    if near:
        hint = f"did you mean {TYPED[near[0]].replace(' ', '-')}?"
    raise ValueError(f"gpu {text!r} is not known; {hint}")
