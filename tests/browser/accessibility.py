"""What axe-core finds wrong with a page: contrast, names, roles, headings, landmarks, in light and in dark."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page


def violations(page: Page) -> list[str]:
    """Scheme, rule and place of each violation of the page as it stands. Leaves it in the light scheme."""
    found = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for rule in Axe().run(page).response["violations"]:
            found += [f"{scheme}: {rule['id']}: {node['target']}" for node in rule["nodes"]]
    return found
