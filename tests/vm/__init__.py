"""Real guests for the tests: `images` makes what a guest is booted from, `rig` boots it and runs scripts in it.

with Guest([Share(socket)]) as guest:
    print(guest.run("mount -t virtiofs fs /mnt && ls /mnt").stdout)
"""
