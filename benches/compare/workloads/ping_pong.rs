//! Two processes that wake each other through pipes.

use std::ffi::c_int;

use crate::libc::{_exit, close, fork, pipe, read, waitpid, write};
use crate::{NotRun, Setting, Work};

/// Reads one byte; `None` at the end or on an error.
fn receive(from: c_int) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: one byte is read to where there is one.
    (unsafe { read(from, (&raw mut byte).cast(), 1) } == 1).then_some(byte)
}

fn send(to: c_int, byte: u8) -> Option<()> {
    // SAFETY: one byte is written from where there is one.
    (unsafe { write(to, (&raw const byte).cast(), 1) } == 1).then_some(())
}

pub(crate) fn run(setting: &Setting) -> Result<Work, NotRun> {
    let rounds = 40_000 / setting.scale;
    Ok(Box::new(move || {
        let (mut there, mut back) = ([0; 2], [0; 2]);
        // SAFETY: both arrays have room for two ends.
        if unsafe { pipe(there.as_mut_ptr()) | pipe(back.as_mut_ptr()) } != 0 {
            return Err(format!("pipe: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: there is one thread, and the child only reads and writes until it ends.
        let child = unsafe { fork() };
        if child == 0 {
            // SAFETY: the ends are ours; the other's must be closed for the end to arrive.
            unsafe {
                close(there[1]);
                close(back[0]);
            }
            while let Some(byte) = receive(there[0]) {
                if send(back[1], byte.wrapping_mul(3)).is_none() {
                    break;
                }
            }
            // SAFETY: ends this process.
            unsafe { _exit(0) }
        }
        if child < 0 {
            return Err(format!("fork: {}", std::io::Error::last_os_error()));
        }
        // SAFETY: these are the child's ends.
        unsafe {
            close(there[0]);
            close(back[1]);
        }
        let mut byte = 1;
        let mut sum = 0;
        for _ in 0..rounds {
            let answer = send(there[1], byte).and_then(|()| receive(back[0]));
            let Some(answer) = answer else {
                return Err("the other process does not answer".to_owned());
            };
            byte = answer.wrapping_add(7);
            sum += u64::from(answer);
        }
        // SAFETY: the last use of these ends, at which the child ends; it is waited for.
        unsafe {
            close(there[1]);
            close(back[0]);
            waitpid(child, std::ptr::null_mut(), 0);
        }
        Ok(sum)
    }))
}
