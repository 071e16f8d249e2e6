"""What the paper reports, as it prints it (per cent), never mixed with what is measured here.

By attack, n (1 as published, 2 with One More Step) and data set or model: Table 1 (ASR and AUC) and Table 2 (TPR
at 1 % and 0.1 % FPR) on DDPMs, Table 3 on text-to-image models, Table 4 on U-ViT, Table 5 (quantile regression)
and Table 6 (GSA).
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


TEXT_TO_IMAGE = ("SD1.5", "SD2.1")

TABLE_3 = {  # (attack, n): (ASR, AUC, TPR at 1 % FPR, TPR at 0.1 % FPR) for each model
    ("NA", 1): ((71.04, 76.67, 19.64, 4.62), (69.58, 74.99, 18.76, 4.42)),
    ("NA", 2): ((73.34, 79.00, 24.40, 8.89), (71.45, 77.40, 23.14, 8.47)),
    ("SecMI", 1): ((57.20, 57.60, 6.29, 2.04), (57.24, 56.61, 3.98, 0.78)),
    ("SecMI", 2): ((60.62, 61.38, 13.21, 5.47), (61.84, 62.29, 10.97, 3.24)),
    ("PIA", 1): ((63.17, 67.59, 12.71, 3.76), (71.15, 78.38, 18.56, 3.36)),
    ("PIA", 2): ((72.08, 78.89, 25.33, 4.26), (77.59, 85.45, 30.47, 9.61)),
}

TABLE_4 = {  # (attack, n): (ASR, AUC, TPR at 1 % FPR) of U-ViT on Cifar10
    ("NA", 1): (61.47, 63.66, 2.62),
    ("NA", 2): (68.51, 74.31, 8.65),
    ("SecMI", 1): (68.21, 74.44, 12.88),
    ("SecMI", 2): (74.95, 82.31, 24.35),
    ("PIA", 1): (54.60, 52.91, 1.80),
    ("PIAN", 1): (59.36, 61.13, 3.42),
    ("PIAN", 2): (69.11, 75.42, 9.86),
}

QUANTILE = ("DDPM Cifar10", "U-ViT Cifar10")

TABLE_5 = {  # (n, nominal FPR): TPR for each model
    (1, 0.05): (27.76, 17.15),
    (1, 0.01): (6.10, 3.13),
    (1, 0.001): (0.38, 0.54),
    (2, 0.05): (44.66, 31.97),
    (2, 0.01): (17.14, 8.62),
    (2, 0.001): (1.38, 1.20),
}

TABLE_6 = {  # n: (ASR, AUC, TPR at 1 % FPR, TPR at 0.1 % FPR) for each model
    1: ((87.56, 94.19, 55.33, 21.85), (87.94, 94.50, 55.86, 21.37)),
    2: ((88.12, 94.53, 56.17, 22.18), (88.64, 95.11, 58.82, 22.53)),
}

Reported = dict[str, dict[str, float]] | None  # by data set or model, as fractions; None where the paper has nothing


def fractions(**per_cent: float) -> dict[str, float]:
    return {name: round(value / 100, 4) for name, value in per_cent.items()}


def ddpm(attack: str, n: int) -> Reported:
    """Tables 1 and 2, by data set."""
    if (attack, n) not in TABLE_1:
        return None
    return {
        dataset: fractions(asr=asr, auc=auc, tpr1=tpr1, tpr01=tpr01)
        for dataset, (asr, auc), (tpr1, tpr01) in zip(DATASETS, TABLE_1[attack, n], TABLE_2[attack, n], strict=True)
    }


def text_to_image(attack: str, n: int) -> Reported:
    """Table 3, by model."""
    if (attack, n) not in TABLE_3:
        return None
    return {
        model: fractions(asr=asr, auc=auc, tpr1=tpr1, tpr01=tpr01)
        for model, (asr, auc, tpr1, tpr01) in zip(TEXT_TO_IMAGE, TABLE_3[attack, n], strict=True)
    }


def uvit(attack: str, n: int) -> Reported:
    """Table 4."""
    if (attack, n) not in TABLE_4:
        return None
    asr, auc, tpr1 = TABLE_4[attack, n]
    return {"U-ViT Cifar10": fractions(asr=asr, auc=auc, tpr1=tpr1)}


def quantile(n: int, nominal: float) -> Reported:
    """Table 5, by model."""
    if (n, nominal) not in TABLE_5:
        return None
    return {model: fractions(tpr=tpr) for model, tpr in zip(QUANTILE, TABLE_5[n, nominal], strict=True)}


def gradients(attack: str, n: int) -> Reported:
    """Table 6, by model."""
    if attack != "GSA" or n not in TABLE_6:
        return None
    return {
        model: fractions(asr=asr, auc=auc, tpr1=tpr1, tpr01=tpr01)
        for model, (asr, auc, tpr1, tpr01) in zip(TEXT_TO_IMAGE, TABLE_6[n], strict=True)
    }
