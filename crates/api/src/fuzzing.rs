//! The server without a socket, for the fuzz target.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::control::Control;
use crate::fake::{FakeMachine, OnButton};
use crate::server::{Service, connection};

/// No conversation takes longer, unless something waits that should not.
const LIMIT: Duration = Duration::from_secs(20);
/// How long the client waits for a server that does not read.
const PATIENCE: Duration = Duration::from_millis(20);

/// What the server says to a client that sends these pieces, one after the other, and then no more. `obedient` says
/// whether the guest powers off when its power button is pressed.
///
/// # Panics
/// If the server does not come to an end.
pub fn converse(pieces: &[Vec<u8>], obedient: bool) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("the host has memory");
    runtime.block_on(async {
        let machine = FakeMachine::new(if obedient {
            OnButton::PowerOff
        } else {
            OnButton::Ignore
        });
        let (client, server) = tokio::io::duplex(4096);
        let service = Service::new(machine.clone(), LIMIT);
        let served = tokio::spawn(connection(server, service));
        let (mut from, mut to) = tokio::io::split(client);
        let send = async {
            for piece in pieces {
                // Fails once the server has closed the connection, and waits while it stops the guest and reads nothing.
                let sent = tokio::time::timeout(PATIENCE, to.write_all(piece)).await;
                if !matches!(sent, Ok(Ok(()))) {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _ = to.shutdown().await;
            // Whoever waits for the guest, by a stop or an attached terminal, need not wait longer.
            machine.stop();
        };
        let mut answer = Vec::new();
        let receive = async {
            let _ = from.read_to_end(&mut answer).await;
        };
        let talk = tokio::time::timeout(LIMIT, both(send, receive));
        assert!(talk.await.is_ok(), "the conversation does not end");
        let end = tokio::time::timeout(LIMIT, served).await;
        assert!(
            matches!(end, Ok(Ok(()))),
            "the connection does not end, or panicked"
        );
        answer
    })
}

async fn both(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut one, mut other) = (std::pin::pin!(one), std::pin::pin!(other));
    let mut left = [true, true];
    std::future::poll_fn(|context| {
        left[0] = left[0] && one.as_mut().poll(context).is_pending();
        left[1] = left[1] && other.as_mut().poll(context).is_pending();
        if left == [false, false] {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
