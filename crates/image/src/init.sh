#!/bin/busybox sh
# The guest's process 1, and with arguments the session that it starts.
#
# It is a shell script on the stock busybox so that the guest needs no program of ours. The guest may
# run on an interpreter, so what stands before the word `init` on the status port forks little.
# The protocol with the VMM is described in the documentation of this crate (src/lib.rs).

export PATH=/sbin:/bin:/usr/sbin:/usr/bin

# Sets $port to the character device of the virtio-console port named $1; fails where there is none.
# The kernel creates the attribute `name` after the device node, so a port that is found can be opened.
find_port() {
    for port in /sys/class/virtio-ports/*; do
        [ -e "$port/name" ] || continue
        name=
        read -r name <"$port/name"
        if [ "$name" = "$1" ]; then
            port=/dev/${port##*/}
            return 0
        fi
    done
    port=
    return 1
}

# Ports appear in the background, after messages between the driver and the VMM. Waits for the
# command $@ to succeed, for 5 seconds or some more at most.
await() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 250 ] || return 1
        sleep 0.02
    done
}

say() {
    echo "$say_prefix$1" >&9
}

# Whether a process other than this one and process 1 lives. Kernel threads and zombies have an empty command line.
others_live() {
    for entry in /proc/[0-9]*; do
        case ${entry#/proc/} in 1 | $$) continue ;; esac
        line=
        { read -r line <"$entry/cmdline"; } 2>/dev/null
        [ -z "$line" ] || return 0
    done
    return 1
}

# Ends the machine in order: `down poweroff` or `down reboot`.
down() {
    trap '' TERM INT USR1 USR2
    kill -TERM -1
    tries=0
    while others_live; do
        tries=$((tries + 1))
        [ $tries -lt 20 ] || break
        sleep 0.1
    done
    kill -KILL -1
    sync
    mounts=
    while read -r device dir _; do
        case $device in /dev/*) mounts="$dir $mounts" ;; esac
    done </proc/mounts
    for dir in $mounts; do
        umount -r "$dir"
    done
    # Reaches the kernel directly; it comes back only if the machine has no way to do it.
    "$1" -f
    while :; do sleep 3600; done
}

# Becomes the program $@.
become() {
    command -v "$1" >/dev/null || {
        echo "trapgate: $1: not found in the guest" >&2
        exit 127
    }
    exec "$@"
}

# Runs the program $@ with the terminal $terminal as standard input, output, error and controlling terminal.
on_terminal() {
    setsid -c /bin/sh /init on-terminal "$@" <"$terminal" >"$terminal" 2>&1 9>&-
}

# Runs the program $@ between named pipes that three `cat` carry to and from the ports. The ports
# themselves would be one process fewer each, but only one process may open a port: `echo x >/dev/stderr`
# would fail.
between_ports() {
    mkfifo /run/trapgate/stdin /run/trapgate/stdout /run/trapgate/stderr
    # The pipe is opened first: if the port can't be, the command sees end of file and does not hang.
    { cat <"$stdin_port"; } >/run/trapgate/stdin 9>&- &
    # What a process says when it is told to end shall still arrive.
    { trap '' TERM; cat >"$stdout_port"; } </run/trapgate/stdout 9>&- &
    out=$!
    { trap '' TERM; cat >"$stderr_port"; } </run/trapgate/stderr 9>&- &
    err=$!
    (become "$@") </run/trapgate/stdin >/run/trapgate/stdout 2>/run/trapgate/stderr 9>&-
    status=$?
    # What the command left behind ends with it; otherwise its ends of the pipes would stay open.
    for entry in /proc/[0-9]*; do
        pid=${entry#/proc/}
        case $pid in 1 | $$ | $out | $err) continue ;; esac
        kill -KILL "$pid" 2>/dev/null
    done
    wait $out
    wait $err
    return $status
}

# The other half of `on_terminal`, on the terminal.
if [ "$1" = on-terminal ]; then
    shift
    [ -z "$COLUMNS" ] || stty columns "$COLUMNS"
    [ -z "$LINES" ] || stty rows "$LINES"
    # The terminal knows its size from here on, and follows the person's window; variables would not.
    unset COLUMNS LINES
    become "$@"
fi

# The session: `/init session TERMINAL SAY_PREFIX STDIN STDOUT STDERR`, the ports empty where there are none.
# Descriptor 9 is the status port.
if [ "$1" = session ]; then
    terminal=$2 say_prefix=$3 stdin_port=$4 stdout_port=$5 stderr_port=$6
    export HOME=/root USER=root LOGNAME=root SHELL=/bin/sh TERM=linux
    [ ! -e /trapgate/env ] || . /trapgate/env
    cd /root
    unset OLDPWD
    if [ -e /trapgate/command ]; then
        # Sets the positional parameters.
        . /trapgate/command
        if [ -n "$stdin_port" ] && [ ! -e /trapgate/tty ]; then
            between_ports "$@"
        else
            on_terminal "$@"
        fi
    else
        on_terminal sh -l
    fi
    say $?
    # Process 1 ends the machine, as for a `poweroff` that a person types.
    kill -USR2 1
    exit
fi

# Process 1 from here.

mount -t devtmpfs devtmpfs /dev
mount -t sysfs sysfs /sys
mount -t proc proc /proc

while read -r module; do
    insmod "$module"
done </etc/trapgate/modules

# A console device (virtio 1.2, 5.3) with the feature VIRTIO_CONSOLE_F_MULTIPORT (bit 1) has named ports.
terminal=
multiport=
for device in /sys/bus/virtio/devices/*; do
    [ -e "$device/device" ] || continue
    read -r id <"$device/device"
    [ "$id" = 0x0003 ] || continue
    terminal=hvc0
    read -r features <"$device/features"
    case $features in ?1*) multiport=yes ;; esac
done

if [ -n "$multiport" ] && await find_port trapgate.status; then
    exec 9>"$port"
    say_prefix=
else
    exec 9>/dev/console
    say_prefix='trapgate-status: '
fi
say init

mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p /run/trapgate
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
echo trapgate >/proc/sys/kernel/hostname
/bin/busybox --install -s
ifconfig lo 127.0.0.1 up

# The drivers for the devices that are there: disks, random numbers, network.
aliases=
for alias in /sys/bus/virtio/devices/*/modalias; do
    [ -e "$alias" ] || continue
    read -r alias <"$alias"
    aliases="$aliases $alias"
done
[ -z "$aliases" ] || modprobe -a -q $aliases 2>/dev/null

stdin_port=
stdout_port=
stderr_port=
if [ -z "$say_prefix" ] && [ -e /trapgate/command ] && [ ! -e /trapgate/tty ]; then
    await find_port trapgate.stdin && stdin_port=$port
    await find_port trapgate.stdout && stdout_port=$port
    await find_port trapgate.stderr && stderr_port=$port
    [ -n "$stdout_port" ] && [ -n "$stderr_port" ] || stdin_port=
elif [ -n "$terminal" ]; then
    await [ -c /dev/hvc0 ] || terminal=
fi
[ -c "/dev/${terminal:-none}" ] || terminal=ttyS0

# busybox's poweroff, halt and reboot send USR2, USR1 and TERM to process 1; Ctrl-Alt-Del sends INT.
# `halt` powers off too: a machine that stands still would only keep its person waiting.
trap 'down poweroff' USR1 USR2
trap 'down reboot' TERM INT

# The second setsid finds itself leader of a process group, so it forks and the first returns at once.
# A plain `&` would leave SIGINT and SIGQUIT ignored in the session for good, and Ctrl-C without effect.
setsid setsid /bin/sh /init session "/dev/$terminal" "$say_prefix" "$stdin_port" "$stdout_port" "$stderr_port"
exec 9>&-

# The power button, which the kernel reports as a key. /etc/acpi/PWRF/00000080 does the rest.
for button in /sys/bus/acpi/devices/LNXPWRBN:* /sys/bus/acpi/devices/PNP0C0C:*; do
    [ -e "$button" ] || continue
    modprobe -a -q button evdev 2>/dev/null
    acpid -f -l /dev/null -p /run/acpid.pid </dev/null >/dev/null 2>&1 &
    break
done

# Signals end this wait at once, and it collects every orphan that ended.
# Without the shell's report of a `sleep` that something killed.
while :; do
    sleep 86400 &
    wait $!
done 2>/dev/null
