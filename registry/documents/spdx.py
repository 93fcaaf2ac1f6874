"""Maps license names to SPDX identifiers and to the identifiers of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

HUB: Mapping[str, str] = {
    "AGPL-3.0-only": "agpl-3.0",
    "AGPL-3.0-or-later": "agpl-3.0",
    "Apache-2.0": "apache-2.0",
    "Artistic-2.0": "artistic-2.0",
    "BSD-2-Clause": "bsd-2-clause",
    "BSD-3-Clause": "bsd-3-clause",
    "CC-BY-2.0": "cc-by-2.0",
    "CC-BY-2.5": "cc-by-2.5",
    "CC-BY-3.0": "cc-by-3.0",
    "CC-BY-4.0": "cc-by-4.0",
    "CC-BY-NC-2.0": "cc-by-nc-2.0",
    "CC-BY-NC-3.0": "cc-by-nc-3.0",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CC-BY-NC-ND-4.0": "cc-by-nc-nd-4.0",
    "CC-BY-NC-ND-3.0": "cc-by-nc-nd-3.0",
    "CC-BY-NC-SA-2.0": "cc-by-nc-sa-2.0",
    "CC-BY-NC-SA-3.0": "cc-by-nc-sa-3.0",
    "CC-BY-NC-SA-4.0": "cc-by-nc-sa-4.0",
    "CC-BY-ND-4.0": "cc-by-nd-4.0",
    "CC-BY-SA-3.0": "cc-by-sa-3.0",
    "CC-BY-SA-4.0": "cc-by-sa-4.0",
    "CC0-1.0": "cc0-1.0",
    "GPL-2.0-only": "gpl-2.0",
    "GPL-2.0-or-later": "gpl-2.0",
    "GPL-3.0-only": "gpl-3.0",
    "GPL-3.0-or-later": "gpl-3.0",
    "ISC": "isc",
    "LGPL-2.1-only": "lgpl-2.1",
    "LGPL-2.1-or-later": "lgpl-2.1",
    "LGPL-3.0-only": "lgpl-3.0",
    "LGPL-3.0-or-later": "lgpl-3.0",
    "MIT": "mit",
    "MPL-2.0": "mpl-2.0",
    "ODbL-1.0": "odbl",
    "Unlicense": "unlicense",
}
"""SPDX identifier -> identifier in the front matter of a model card (https://huggingface.co/docs/hub/repositories-licenses)."""

_RAIL = {
    "LicenseRef-CreativeML-OpenRAIL-M": "creativeml-openrail-m",
    "LicenseRef-CreativeML-OpenRAILpp-M": "openrail++",
    "LicenseRef-CreativeML-OpenRAILpp-M-SDXL": "openrail++",
    # Ids of earlier releases, which SPDX does not allow.
    "LicenseRef-CreativeML-OpenRAIL++-M": "openrail++",
    "LicenseRef-CreativeML-OpenRAIL++-M-SDXL": "openrail++",
    "LicenseRef-OpenRAIL": "openrail",
    **{name: name for name in ("creativeml-openrail-m", "openrail", "openrail++", "bigscience-openrail-m")},
}


def is_spdx(name: str) -> bool:
    """Returns True if the name is an identifier of the SPDX list; documents state any other license by name."""
    try:
        return canonicalize_license_expression(name) == name and " " not in name and not name.startswith("LicenseRef-")
    except InvalidLicenseExpression:
        return False


def hub_license(name: str | None) -> dict[str, str]:
    """Returns the license entries of a model card's front matter."""
    if not name:
        return {"license": "unknown"}
    if name in HUB:
        return {"license": HUB[name]}
    if rail := _RAIL.get(name, _RAIL.get(name.lower())):
        return {"license": rail}
    return {"license": "other", "license_name": "-".join(name.lower().split())[:120]}
