"""The package with its recipes, presets and accelerate configurations, which stand beside it in the repository."""

from setuptools import find_packages, setup

setup(
    include_package_data=False,  # of what the source archive has, only this
    packages=[*find_packages(include=["rlkd_trl", "rlkd_trl.*"]), "rlkd_trl.recipes", "rlkd_trl.accelerate_configs"],
    package_dir={"rlkd_trl.recipes": "recipes", "rlkd_trl.accelerate_configs": "accelerate_configs"},
    package_data={
        "rlkd_trl": ["prompts/builtin/*.yaml", "evaluation/report_page/*"],
        "rlkd_trl.recipes": ["configs/*.yaml", "configs/methods/*/*.yaml", "rewards/*.py"],
        "rlkd_trl.accelerate_configs": ["*.yaml"],
    },
)
