"""The attacks, by name. A new one is a file here and a line below."""

from oms_core.attacks.base import Attack, Probe
from oms_core.attacks.naive import NA
from oms_core.attacks.pia import PIA, PIAN
from oms_core.attacks.secmi import SECMI, SECMI_RELEASED, SECMI_X_T

ATTACKS = {attack.name: attack for attack in (NA, PIA, PIAN, SECMI, SECMI_X_T, SECMI_RELEASED)}
COMPARED = ("NA", "PIA", "PIAN", "SecMI", "SecMI-xt")  # what `all` means

__all__ = ["ATTACKS", "COMPARED", "Attack", "Probe"]
