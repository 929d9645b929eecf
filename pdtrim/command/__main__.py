from pdtrim.command import app

app(prog_name="pdtrim")
