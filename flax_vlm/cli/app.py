"""The application that the commands of this package register with."""

import tyro

app = tyro.extras.SubcommandApp()
