"""The attacks, by name. A new one is a file here and a line below."""

from oms_core.attacks.base import Attack, Learned, Probe, Search
from oms_core.attacks.clid import CLID
from oms_core.attacks.gsa import GSA, GSA_LAST
from oms_core.attacks.jacobian import JACOBIAN
from oms_core.attacks.naive import NA
from oms_core.attacks.pia import PIA, PIAN
from oms_core.attacks.quantile import QR
from oms_core.attacks.repeated import NA_REPEATED, PIA_REPEATED, PIAN_REPEATED, SECMI_REPEATED
from oms_core.attacks.secmi import SECMI, SECMI_RELEASED, SECMI_X_T
from oms_core.attacks.sima import SIMA
from oms_core.attacks.trajectory import (
    NA_CALIBRATED,
    NA_TRAJECTORY,
    PIA_CALIBRATED,
    PIA_TRAJECTORY,
    SECMI_TRAJECTORY,
)

ALL = (
    *(NA, PIA, PIAN, SECMI, SECMI_X_T, SECMI_RELEASED, SIMA, CLID, JACOBIAN, QR, GSA, GSA_LAST),
    *(NA_TRAJECTORY, PIA_TRAJECTORY, SECMI_TRAJECTORY, NA_CALIBRATED, PIA_CALIBRATED),
    *(NA_REPEATED, PIA_REPEATED, PIAN_REPEATED, SECMI_REPEATED),
)
ATTACKS = {attack.name: attack for attack in ALL}
MEASURED = {one.name: one for attack in ALL for one in ([attack.base] if isinstance(attack, Learned) else [attack])}
SEARCHES = {name: attack for name, attack in ATTACKS.items() if isinstance(attack, Search)}
COMPARED = ("NA", "PIA", "PIAN", "SecMI", "SecMI-xt")  # what `all` means
RIVALS = {name: f"{name}-repeated" for name in ("NA", "PIA", "PIAN", "SecMI")}  # the same budget without OMS

__all__ = ["ATTACKS", "COMPARED", "MEASURED", "RIVALS", "SEARCHES", "Attack", "Learned", "Probe", "Search"]
