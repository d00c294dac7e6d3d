"""Gives setuptools what pyproject.toml calls dynamic. Every value comes from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=['='])
settings.read(root/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']

pythons = [f'Programming Language :: Python :: 3.{minor}' for minor in range(int(cfg['min_python'].split('.')[1]), 14)]
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(),
    license={'apache2': 'Apache-2.0'}[cfg['license']],
    license_files=['LICENSE'],
    author=cfg['author'],
    url=cfg['git_url'],
    classifiers=[f'Development Status :: {statuses[cfg["status"]]}', f'Intended Audience :: {cfg["audience"]}',
                 f'Natural Language :: {cfg["language"]}', *pythons],
    packages=find_packages(include=['flowtok', 'flowtok.*']),
    include_package_data=False,
    package_data={'flowtok': ['weights/**/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'captions', 'real', 'hf', 'demo', 'docs', 'peers')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'papermill.io': cfg['papermill_io'].split(),
                  'flowtok.pipelines': cfg['pipelines'].split()},
    zip_safe=False,
)
