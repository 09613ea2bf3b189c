"""What more than one client needs: how calls are served, or wait, while a dependency fails."""
