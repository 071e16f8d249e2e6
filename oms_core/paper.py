"""What the paper reports, as it prints it (per cent), never mixed with what is measured here.

Table 1 (ASR and AUC) and Table 2 (TPR at 1 % and 0.1 % FPR) on DDPMs, by attack, n (1 as published, 2 with One
More Step) and data set.
"""

DATASETS = ("Cifar10", "Cifar100", "LFW", "LSUN-Cat")

TABLE_1 = {  # (attack, n): (ASR, AUC) for each data set
    ("NA", 1): ((71.86, 78.28), (75.97, 82.18), (72.40, 79.54), (62.60, 67.02)),
    ("NA", 2): ((78.21, 85.71), (81.49, 88.27), (83.02, 90.73), (68.89, 75.10)),
    ("SecMI", 1): ((84.01, 90.68), (79.83, 86.77), (61.49, 64.90), (73.13, 79.36)),
    ("SecMI", 2): ((86.48, 92.82), (83.32, 90.62), (77.80, 85.67), (84.59, 91.20)),
    ("PIA", 1): ((88.75, 94.89), (85.20, 92.21), (82.10, 90.17), (77.61, 84.87)),
    ("PIA", 2): ((91.78, 97.26), (89.68, 96.08), (84.49, 92.27), (82.58, 89.65)),
}

TABLE_2 = {  # (attack, n): (TPR at 1 % FPR, TPR at 0.1 % FPR) for each data set
    ("NA", 1): ((6.42, 0.88), (3.66, 0.23), (10.86, 1.12), (3.40, 0.36)),
    ("NA", 2): ((12.12, 2.34), (8.03, 0.66), (30.01, 5.66), (6.37, 0.79)),
    ("SecMI", 1): ((9.15, 0.49), (7.19, 0.22), (3.65, 0.42), (3.10, 0.12)),
    ("SecMI", 2): ((15.87, 0.99), (17.33, 1.33), (28.05, 7.64), (11.24, 0.56)),
    ("PIA", 1): ((28.86, 1.05), (19.41, 2.31), (25.74, 7.00), (8.90, 0.42)),
    ("PIA", 2): ((60.11, 13.24), (48.30, 10.66), (29.72, 9.22), (13.59, 0.94)),
}


def ddpm(attack: str, n: int) -> dict[str, dict[str, float]] | None:
    """The paper's figures for an attack on DDPMs by data set, as fractions; None where it has none."""
    if (attack, n) not in TABLE_1:
        return None
    return {
        dataset: {
            "asr": round(asr / 100, 4),
            "auc": round(auc / 100, 4),
            "tpr1": round(tpr1 / 100, 4),
            "tpr01": round(tpr01 / 100, 4),
        }
        for dataset, (asr, auc), (tpr1, tpr01) in zip(DATASETS, TABLE_1[attack, n], TABLE_2[attack, n], strict=True)
    }
